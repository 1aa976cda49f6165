"""`MLXBuilder`: from specs to backends that share their bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_sway.backends.checkpoints.sizes import estimated
from pytest_sway.backends.local.pooled_builder import PooledBuilder
from pytest_sway.backends.mlx.adapters.files import read_mlx_adapter
from pytest_sway.backends.mlx.check import check_spec
from pytest_sway.backends.mlx.model.libraries import import_libraries
from pytest_sway.backends.mlx.model.placement import resolve_placement
from pytest_sway.errors import SwayError
from pytest_sway.spec.identity import base_spec, finetuned_spec, resolved_key

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from pytest_sway.backends.local.pool import Share
    from pytest_sway.backends.mlx.adapters.files import AdapterFiles
    from pytest_sway.backends.mlx.backend import MLXBackend
    from pytest_sway.backends.mlx.model.base import LoadedBase
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_FLOAT32_BYTES: Final = 4


class MLXBuilder(PooledBuilder["LoadedBase"]):
    """Builds backends of kind ``mlx``; those whose specs agree on the base share it."""

    placed = staticmethod(resolve_placement)

    def check(self, spec: ModelSpec) -> None:
        """Find what can be found wrong with ``spec`` without loading it.

        Raises:
            SwayError: Loading it would fail.
        """
        policy = self._on_base_mismatch if self._on_base_mismatch == "error" else "ignore"  # the load will warn
        check_spec(resolve_placement(spec), on_base_mismatch=policy)

    def estimate(self, spec: ModelSpec) -> Mapping[Hashable, int] | None:
        """Return the bytes that each part of ``spec`` will take, or ``None`` if that cannot be known."""
        spec = resolve_placement(spec)
        tuned = finetuned_spec(spec)
        found = [estimated(base_spec(spec)), {} if tuned is None else estimated(tuned), _adapter_bytes(spec)]
        return None if None in found else {key: size for parts in found for key, size in (parts or {}).items()}

    def _planned(self, spec: ModelSpec) -> AdapterFiles | None:
        return check_spec(spec, on_base_mismatch=self._on_base_mismatch)

    def _assemble(self, spec: ModelSpec, plan: AdapterFiles | None, shares: list[Share[LoadedBase]]) -> MLXBackend:
        import_libraries()
        from pytest_sway.backends.local.pooled_backend import Loaded
        from pytest_sway.backends.local.tokenizer_copies import RustRecord
        from pytest_sway.backends.mlx.adapters.attach import adapter_tokenizer, load_adapter
        from pytest_sway.backends.mlx.adapters.verification import verify_effect
        from pytest_sway.backends.mlx.adapters.verify_finetuned import verify_finetuned
        from pytest_sway.backends.mlx.backend import MLXBackend
        from pytest_sway.backends.mlx.model.base import encoder_of
        from pytest_sway.backends.mlx.model.bound_model import Side

        base = self._clean_base(base_spec(spec), shares)
        loaded = Loaded(list(shares), Side(base, base.model, base.tokenizer))
        tuned_spec = finetuned_spec(spec)
        if tuned_spec is not None:
            tuned = self._clean_base(tuned_spec, shares)
            verify_finetuned(base, tuned)
            loaded.shares, loaded.tuned = list(shares), Side(tuned, tuned.model, tuned.tokenizer)
        elif plan is not None:
            loaded.adapter = loaded.contents = load_adapter(base, plan)
            tokenizer = adapter_tokenizer(base, plan)
            loaded.tuned = Side(base, loaded.adapter.model, tokenizer)
            verify_effect(loaded.tuned, plan)
            loaded.rust = None if tokenizer is base.tokenizer else RustRecord(encoder_of(tokenizer))
        return MLXBackend(spec, loaded, self._pool.withdraw)

    def _load_base(self, spec: ModelSpec) -> LoadedBase:
        from pytest_sway.backends.mlx.adapters.verification import verify_base
        from pytest_sway.backends.mlx.model.base import load_base

        base = load_base(spec)
        verify_base(base)
        return base

    @staticmethod
    def _close_base(base: LoadedBase) -> None:
        base.close()


def _adapter_bytes(spec: ModelSpec) -> Mapping[Hashable, int] | None:
    """What an adapter takes: as much as its file, or what PEFT's takes in float32."""
    if spec.adapter is None:
        return {}
    try:
        files = read_mlx_adapter(spec.adapter)
    except SwayError:
        return None
    item_bytes = {True: lambda entry: entry.numel * _FLOAT32_BYTES, False: lambda entry: entry.nbytes}[files.peft]
    return {("adapter", *resolved_key(spec)): sum(map(item_bytes, files.entries.values()))}
