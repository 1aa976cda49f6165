"""What can be found wrong with a spec before anything is loaded, or evicted to make room for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sway.backends.checkpoints.bounds import require_bounded, require_files
from pytest_sway.backends.checkpoints.hub_files import config_of, require_another, require_cached
from pytest_sway.backends.checkpoints.lineage import MLX_FIELD, PEFT_FIELD, require_same_base
from pytest_sway.backends.mlx.adapters.files import read_mlx_adapter
from pytest_sway.backends.mlx.model.libraries import require_libraries
from pytest_sway.backends.mlx.model.placement import require_device
from pytest_sway.errors import SpecError, WeightsError
from pytest_sway.spec.identity import finetuned_spec
from pytest_sway.spec.paths import is_path

if TYPE_CHECKING:
    from pytest_sway.backends.mlx.adapters.files import AdapterFiles
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


def check_spec(spec: ModelSpec, *, on_base_mismatch: str = "ignore") -> AdapterFiles | None:
    """Check the files of a resolved spec and return what its adapter's folder says; ``None`` without an adapter.

    Args:
        spec: What is to be loaded.
        on_base_mismatch: What an adapter gets that names another base: ``error``, ``warn`` or ``ignore``.

    Raises:
        SpecError: The folder of the base, the adapter or the fine-tuned model is missing, or is no such folder; the
            fine-tuned model is the base; or the device is not there.
        WeightsError: Weights are missing, broken, only there as a pickle, or would have to be fetched, offline.
        AdapterMismatchError: The adapter is one of PEFT that cannot be converted exactly, or was made on another base
            where that is an error.
        BackendNotAvailableError: mlx or mlx-lm is not installed.
    """
    _check_model(spec, "base")
    tuned = finetuned_spec(spec)
    if tuned is not None:
        require_another(spec, tuned)
        _check_model(tuned, "fine-tuned model")
    if spec.adapter is not None:
        require_files(spec.adapter)
    files = None if spec.adapter is None else read_mlx_adapter(spec.adapter)
    if files is not None:
        require_bounded(files, None)
        require_same_base(spec, files.config, on_base_mismatch, PEFT_FIELD if files.peft else MLX_FIELD)
    require_libraries(spec)
    require_device(spec)
    require_cached(spec, "base")
    if tuned is not None:
        require_cached(tuned, "fine-tuned model")
    return files


def _check_model(spec: ModelSpec, role: str) -> None:
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
    if config_of(spec).get("model_file") and not spec.trust_remote_code:
        raise SpecError(
            f"the {role} {spec.base!r} brings its own code (model_file in its config.json), which is not run unless"
            " the spec says trust_remote_code=True. Read that code first."
        )
