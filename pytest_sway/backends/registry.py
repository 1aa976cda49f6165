"""From a spec to a live backend: one module or package per kind, imported when the kind is first asked for.

`Builder` is what the cache builds with. It keeps what the backends of a kind share, such as the loaded bases, and
answers the cache's questions about a spec before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.contract import PooledBuilder
from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.spec.identity import Key, resolved_key, with_adapter
from pytest_sway.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.protocols import DifferentialBackend


__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


def resolve(spec: ModelSpec, *, device: str = "auto", dtype: str = "auto") -> ModelSpec:
    """Return ``spec`` with the device and dtype that ``auto`` stands for.

    Args:
        spec: Any spec.
        device: What ``auto`` means for devices; itself ``auto`` for the best that the machine has.
        dtype: What ``auto`` means for dtypes; itself ``auto`` for the best that the device computes.
    """
    if spec.device == "auto" and device != "auto":
        spec = replace(spec, device=device)
    if spec.dtype == "auto" and dtype != "auto":
        spec = replace(spec, dtype=dtype)  # type: ignore[arg-type] # checked by ModelSpec itself
    if spec.kind == "hf":
        from pytest_sway.backends.hf.loading.placement import resolve_placement

        return resolve_placement(spec)
    if spec.kind == "mlx":
        from pytest_sway.backends.mlx.model.placement import resolve_placement as resolve_mlx_placement

        return resolve_mlx_placement(spec)
    return spec


class Builder:
    """Builds backends of every kind and keeps what they share.

    Args:
        device: What ``auto`` means for devices in this run.
        dtype: What ``auto`` means for dtypes in this run.
        on_base_load: Called with the base's name and the seconds that it took, whenever a base was loaded.
        share_weights: A folder through which this process and others on this host hold one copy of converted weights;
            ``None`` for a copy of its own.
        score_cache: The most bytes of answers that each base of kind ``hf`` remembers; 0 for none.
        on_recall: Called with a base's name, how many answers it gave from memory, and the seconds they once took.
        on_base_mismatch: What an adapter gets that names another base: ``error``, ``warn`` or ``ignore``.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: str = "auto",
        on_base_load: Callable[[str, float], None] | None = None,
        share_weights: Path | None = None,
        score_cache: int = 64 * 2**20,
        on_recall: Callable[[str, int, float], None] | None = None,
        on_base_mismatch: str = "warn",
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._on_base_load = on_base_load
        self._share_weights = share_weights
        self._score_cache = score_cache
        self._on_recall = on_recall
        self._on_base_mismatch = on_base_mismatch
        self._pooled: dict[str, PooledBuilder] = {}

    def __call__(self, spec: ModelSpec, *, adapter_path: Path | None = None) -> DifferentialBackend:
        """Build the backend of ``spec``."""
        spec = self.resolve(with_adapter(spec, adapter_path))
        pooled = self._pooled_builder(spec)
        if pooled is not None:
            return pooled.build(spec)
        if spec.kind == "dummy":
            from pytest_sway.backends.dummy.backend import build_dummy

            return build_dummy(spec)
        if spec.kind == "api":
            from pytest_sway.backends.api.builder import build_api

            return build_api(spec)
        from pytest_sway.backends.custom import build_custom

        return build_custom(spec)

    def resolve(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with the device and dtype that it will be loaded with."""
        return resolve(spec, device=self._device, dtype=self._dtype)

    def check(self, spec: ModelSpec) -> None:
        """Find what can be found wrong with a resolved spec without loading it.

        Raises:
            SwayError: Loading it would fail.
        """
        pooled = self._pooled_builder(spec)
        if pooled is not None:
            pooled.check(spec)
        elif spec.kind == "dummy":
            from pytest_sway.backends.dummy.backend import build_dummy

            build_dummy(spec)  # which is as quick as a check
        elif spec.kind == "api":
            from pytest_sway.backends.api.builder import check_api

            check_api(spec)
        else:
            from pytest_sway.backends.custom import import_class

            import_class(spec)

    def estimate(self, spec: ModelSpec) -> Mapping[Hashable, int] | None:
        """Return the bytes that each part of a resolved spec will take, or ``None`` if that cannot be known.

        Parts that several backends share, such as a base, have equal keys, and count once.
        """
        pooled = self._pooled_builder(spec)
        if pooled is not None:
            return pooled.estimate(spec)
        return {} if spec.kind in ("dummy", "api") else None  # no model here, no weights

    def measure(self, backend: Any) -> Mapping[Hashable, int] | None:
        """Return the bytes that each part of a loaded backend takes, keyed as in `estimate`."""
        sizes = getattr(backend, "sizes", None)
        return sizes() if callable(sizes) else None

    def hold(self, spec: ModelSpec) -> AbstractContextManager[None]:
        """Keep what a resolved spec will share with others from being closed while room is made for it."""
        pooled = self._pooled_builder(spec)
        return nullcontext() if pooled is None else pooled.hold(spec)

    def exhausted(self, error: Exception) -> bool:
        """Return whether ``error`` says that the memory of a device, or of the machine, ran out."""
        return out_of_memory(error)

    def _pooled_builder(self, spec: ModelSpec) -> PooledBuilder | None:
        """What builds the kinds whose backends share their bases; ``None`` for the other kinds."""
        if spec.kind == "hf" and "hf" not in self._pooled:
            from pytest_sway.backends.hf.builder import HFBuilder

            self._pooled["hf"] = HFBuilder(
                on_base_load=self._on_base_load,
                share_weights=self._share_weights,
                score_cache=self._score_cache,
                on_recall=self._on_recall,
                on_base_mismatch=self._on_base_mismatch,
            )
        elif spec.kind == "mlx" and "mlx" not in self._pooled:
            from pytest_sway.backends.mlx.builder import MLXBuilder

            self._pooled["mlx"] = MLXBuilder(on_base_load=self._on_base_load, on_base_mismatch=self._on_base_mismatch)
        return self._pooled.get(spec.kind)


def cache_key_for(spec: ModelSpec, *, adapter_path: Path | None = None) -> Key:
    """Return the identity of what ``spec`` loads.

    The key begins ``(kind, base, str(adapter) or None, dtype, device)``, with the device and dtype that ``auto`` stands
    for on this machine; asking that imports torch when the kind needs it and it is installed. It goes on with every
    other field that changes what is loaded, and with the state of the files.

    Args:
        spec: What is asked for.
        adapter_path: An adapter that takes the place of the spec's own.
    """
    return resolved_key(resolve(with_adapter(spec, adapter_path)))
