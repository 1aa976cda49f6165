"""`MLXBuilder`: check specs before anything is loaded, or evicted to make room, and build backends that share bases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_sway.backends.checkpoints.bounds import require_bounded, require_files
from pytest_sway.backends.checkpoints.hub_files import config_of, require_another, require_cached
from pytest_sway.backends.checkpoints.plan import ModelFiles, Plan
from pytest_sway.backends.checkpoints.sizes import base_entries, model_sizes
from pytest_sway.backends.local.pooled_builder import PooledBuilder
from pytest_sway.backends.mlx.adapters.files import read_mlx_adapter
from pytest_sway.backends.mlx.model.libraries import import_libraries, require_libraries
from pytest_sway.backends.mlx.model.placement import require_device, resolve_placement
from pytest_sway.errors import SpecError, WeightsError
from pytest_sway.spec.identity import base_spec, finetuned_spec, resolved_key, state_of_files
from pytest_sway.spec.paths import is_path

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from pytest_sway.backends.local.pool import PoolLease
    from pytest_sway.backends.mlx.adapters.files import AdapterFiles
    from pytest_sway.backends.mlx.backend import MLXBackend
    from pytest_sway.backends.mlx.model.base import LoadedBase
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


_FLOAT32_BYTES: Final = 4


def check_spec(spec: ModelSpec) -> Plan:
    """Check the files of a resolved spec and return the plan for its load.

    Args:
        spec: The resolved spec.

    Raises:
        SpecError: A folder of the base, the adapter or the fine-tuned model is missing or is something else; the
            fine-tuned model is the base; or the device does not exist.
        WeightsError: Weights are missing, broken, only there as a pickle, or need a download while offline.
        AdapterMismatchError: The adapter is one of PEFT's that cannot be converted exactly.
        BackendNotAvailableError: mlx or mlx-lm is not installed.
    """
    state = state_of_files(spec)
    models = [_check_model(base_spec(spec), "base")]
    tuned = finetuned_spec(spec)
    if tuned is not None:
        require_another(spec, tuned)
        models.append(_check_model(tuned, "fine-tuned model"))
    files = None
    for folder in map(Path, spec.adapters):  # one at most
        require_files(folder)
        files = read_mlx_adapter(folder)
        require_bounded(files, None)
    require_libraries(spec)
    require_device(spec)
    require_cached(spec, "base")
    if tuned is not None:
        require_cached(tuned, "fine-tuned model")
    plan = Plan(spec, resolved_key(spec), state, files, tuple(models))  # its key digests files that passed the check
    return replace(plan, sizes=_estimated(plan))


def _estimated(plan: Plan) -> Mapping[Hashable, int] | None:
    """The sizes of a plan's parts. An adapter takes as much as its file; one of PEFT's is converted to float32."""
    sizes, files = model_sizes(plan), plan.read
    if sizes is None or files is None:
        return sizes
    entries = files.entries.values()
    own = sum(entry.numel * _FLOAT32_BYTES if files.peft else entry.nbytes for entry in entries)
    return {**sizes, ("adapter", *plan.key): own}


def _check_model(spec: ModelSpec, role: str) -> ModelFiles:
    folder = Path(spec.base)
    if is_path(spec.base):
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise SpecError(f"the {role} {spec.base!r} {what}. Name a hub id (org/name) or the folder of a model.")
        require_files(folder)
        if not (folder / "config.json").is_file():
            raise SpecError(f"the {role} {spec.base!r} has no config.json, so it is not the folder of a model.")
        if not any(folder.glob("model*.safetensors")):
            raise WeightsError(
                f"the {role} {spec.base!r} has no weights that MLX reads: expected model.safetensors in it, or"
                " model-*.safetensors. Pickles are not read; save it as safetensors."
            )
    config = config_of(spec)
    if config.get("model_file") and not spec.trust_remote_code:
        raise SpecError(
            f"the {role} {spec.base!r} brings its own code (model_file in its config.json), which runs only if the spec"
            " sets trust_remote_code=True. Read that code first."
        )
    try:
        entries = base_entries(spec)
    except WeightsError:  # mlx-lm may read other files; if they are broken, its load says so
        entries = None
    return ModelFiles(spec, resolved_key(spec), config, entries)


class MLXBuilder(PooledBuilder["LoadedBase"]):
    """Builds backends of kind ``mlx``, which share a base if their specs agree on it."""

    placed = staticmethod(resolve_placement)

    _checked = staticmethod(check_spec)

    def _assemble(self, plan: Plan, shares: list[PoolLease[LoadedBase]]) -> MLXBackend:
        files: AdapterFiles | None = plan.read
        import_libraries()
        from pytest_sway.backends.local.pooled_backend import Loaded
        from pytest_sway.backends.local.tokenizer_copies import RustRecord
        from pytest_sway.backends.mlx.adapters.attach import adapter_tokenizer, load_adapter
        from pytest_sway.backends.mlx.adapters.verification import verify_effect, verify_finetuned
        from pytest_sway.backends.mlx.backend import MLXBackend
        from pytest_sway.backends.mlx.model.base import encoder_of
        from pytest_sway.backends.mlx.model.bound_model import BoundModel

        base, *fine_tuned = [self._clean_base(model, shares) for model in plan.models]
        loaded = Loaded(list(shares), BoundModel(base, base.model, base.tokenizer))
        for tuned in fine_tuned:
            verify_finetuned(base, tuned)
            loaded.tuned = BoundModel(tuned, tuned.model, tuned.tokenizer)
        if files is not None:
            loaded.adapter = loaded.contents = load_adapter(base, files)
            tokenizer = adapter_tokenizer(base, files)
            loaded.tuned = BoundModel(base, loaded.adapter.model, tokenizer)
            verify_effect(loaded.tuned, files)
            loaded.rust = None if tokenizer is base.tokenizer else RustRecord(encoder_of(tokenizer))
        return MLXBackend(plan, loaded, self._pool.withdraw)

    def _load_base(self, spec: ModelSpec) -> LoadedBase:
        from pytest_sway.backends.mlx.adapters.verification import verify_base
        from pytest_sway.backends.mlx.model.base import load_base

        base = load_base(spec)
        verify_base(base)
        return base

    @staticmethod
    def _close_base(base: LoadedBase) -> None:
        base.close()
