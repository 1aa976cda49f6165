"""`MLXBuilder`: build backends that share their bases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sway.backends.local.pooled_builder import PooledBuilder
from pytest_sway.backends.mlx.check import check_spec
from pytest_sway.backends.mlx.model.libraries import import_libraries
from pytest_sway.backends.mlx.model.placement import resolve_placement

if TYPE_CHECKING:
    from pytest_sway.backends.checkpoints.plan import Plan
    from pytest_sway.backends.local.pool import PoolLease
    from pytest_sway.backends.mlx.adapters.files import AdapterFiles
    from pytest_sway.backends.mlx.backend import MLXBackend
    from pytest_sway.backends.mlx.model.base import LoadedBase
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


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
        from pytest_sway.backends.mlx.adapters.verification import verify_effect
        from pytest_sway.backends.mlx.adapters.verify_finetuned import verify_finetuned
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
