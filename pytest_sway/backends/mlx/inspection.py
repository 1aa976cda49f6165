"""Whether arrays are still what they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

SAMPLES: Final = 32
"""Elements of each array that are compared: MLX counts no writes."""


class ArraysRecord:
    """What some arrays were like.

    Args:
        kind: What a report calls one of them.
        arrays: The arrays by name.
    """

    def __init__(self, kind: str, arrays: Mapping[str, Any]) -> None:
        self._kind = kind
        self._arrays = dict(arrays)
        self._samples = _samples(self._arrays.values())

    def changes(self, now: Mapping[str, Any]) -> list[str]:
        """One line for each array that is no longer as it was.

        Args:
            now: The arrays that stand in the places now, by name.
        """
        lines = [
            f"{self._kind} {name}: {'removed' if now.get(name) is None else 'replaced'}"
            for name, array in self._arrays.items()
            if now.get(name) is not array
        ]
        lines += [f"{self._kind} {name}: added" for name in now if name not in self._arrays]
        if lines:
            return lines
        samples = _samples(self._arrays.values())
        return [
            f"{self._kind} {name}: contents changed"
            for name, before, after in zip(self._arrays, self._samples, samples, strict=True)
            if before != after
        ]


def _samples(arrays: Iterable[Any]) -> list[bytes]:
    """Some elements of each array, spread over it, as bytes, so that a NaN is equal to itself."""
    import mlx.core as mx
    import numpy as np

    picked = []
    for array in arrays:
        flat = array.reshape(-1)
        flat = flat[:: max(1, flat.size // SAMPLES)][:SAMPLES]
        picked.append(flat.astype(mx.float32) if mx.issubdtype(flat.dtype, mx.floating) else flat)
    mx.eval(picked)
    return [np.array(sample).tobytes() for sample in picked]
