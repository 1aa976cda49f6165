"""`MLXBuilder`: from specs to backends that share their bases."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from pytest_sway.backends.checkpoints.sizes import estimated
from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.backends.local.pool import SharedPool
from pytest_sway.backends.mlx.adapters.files import read_mlx_adapter
from pytest_sway.backends.mlx.check import check_spec
from pytest_sway.backends.mlx.model.libraries import import_libraries
from pytest_sway.backends.mlx.model.placement import resolve_placement
from pytest_sway.errors import SwayError
from pytest_sway.spec.identity import base_key, base_spec, finetuned_spec, resolved_key
from pytest_sway.system.frames import forget_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from pytest_sway.backends.local.pool import Share
    from pytest_sway.backends.mlx.adapters.files import AdapterFiles
    from pytest_sway.backends.mlx.backend import MLXBackend
    from pytest_sway.backends.mlx.model.base import LoadedBase
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_FLOAT32_BYTES: Final = 4


class MLXBuilder:
    """Builds backends of kind ``mlx``; those whose specs agree on the base share it.

    Args:
        on_base_load: Called with the base's name and the seconds that it took, whenever a base was loaded.
        on_base_mismatch: What an adapter gets that names another base: ``error``, ``warn`` or ``ignore``.
    """

    def __init__(
        self, on_base_load: Callable[[str, float], None] | None = None, *, on_base_mismatch: str = "warn"
    ) -> None:
        self._on_base_load = on_base_load
        self._on_base_mismatch = on_base_mismatch
        self._pool: SharedPool[Hashable, LoadedBase] = SharedPool(close=_close_base)

    def build(self, spec: ModelSpec) -> MLXBackend:
        """Load what ``spec`` asks for and is not loaded yet.

        Raises:
            SwayError: It cannot be loaded; the message says why and what to do.
        """
        spec = resolve_placement(spec)
        files = check_spec(spec, on_base_mismatch=self._on_base_mismatch)
        shares: list[Share[LoadedBase]] = []
        handled = sys.exception()
        try:
            return self._assemble(spec, files, shares)
        except BaseException as error:
            forget_frames(error, handled)
            while shares:
                shares.pop().release()
            raise

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

    @contextmanager
    def hold(self, spec: ModelSpec) -> Iterator[None]:
        """Keep the bases of ``spec``, if they are loaded, from being closed inside the block."""
        spec = resolve_placement(spec)
        tuned = finetuned_spec(spec)
        with (
            self._pool.hold(base_key(spec)),
            nullcontext() if tuned is None else self._pool.hold(base_key(tuned)),
        ):
            yield

    def exhausted(self, error: Exception) -> bool:
        """Return whether ``error`` says that memory ran out."""
        return out_of_memory(error)

    def _assemble(self, spec: ModelSpec, files: AdapterFiles | None, shares: list[Share[LoadedBase]]) -> MLXBackend:
        import_libraries()
        from pytest_sway.backends.mlx.adapters.attach import adapter_tokenizer, load_adapter
        from pytest_sway.backends.mlx.adapters.verification import verify_effect
        from pytest_sway.backends.mlx.adapters.verify_finetuned import verify_finetuned
        from pytest_sway.backends.mlx.backend import Loaded, MLXBackend
        from pytest_sway.backends.mlx.model.bound_model import Side

        base = self._clean_base(base_spec(spec), shares)
        tuned_spec = finetuned_spec(spec)
        if tuned_spec is not None:
            tuned = self._clean_base(tuned_spec, shares)
            verify_finetuned(base, tuned)
            sides = Side(base, base.model, base.tokenizer), Side(tuned, tuned.model, tuned.tokenizer)
            loaded = Loaded(list(shares), *sides)
        elif files is not None:
            adapter = load_adapter(base, files)
            side = Side(base, adapter.model, adapter_tokenizer(base, files))
            verify_effect(side, files)
            loaded = Loaded(list(shares), Side(base, base.model, base.tokenizer), side, adapter)
        else:
            loaded = Loaded(list(shares), Side(base, base.model, base.tokenizer), None)
        return MLXBackend(spec, loaded, self._pool.withdraw)

    def _clean_base(self, spec: ModelSpec, shares: list[Share[LoadedBase]]) -> LoadedBase:
        """Claim the base of ``spec``; one that somebody has changed is left to its users, and loaded anew."""
        while True:
            share = self._pool.acquire(base_key(spec), lambda: self._timed(spec))
            shares.append(share)
            base = share.value
            if share.fresh or not base.changes():
                return base
            self._pool.withdraw(base)
            shares.pop().release()

    def _timed(self, spec: ModelSpec) -> LoadedBase:
        from pytest_sway.backends.mlx.adapters.verification import verify_base
        from pytest_sway.backends.mlx.model.base import load_base

        started = time.perf_counter()
        base = load_base(spec)
        verify_base(base)
        if self._on_base_load is not None:
            self._on_base_load(spec.base, time.perf_counter() - started)
        return base


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


def _close_base(base: LoadedBase) -> None:
    base.close()
