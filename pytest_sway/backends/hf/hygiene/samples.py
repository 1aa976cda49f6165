"""Samples a few elements of each tensor as views, which also show writes that torch does not count."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.sharing.tensor_memory import as_integers

if TYPE_CHECKING:
    from collections.abc import Sequence

__tracebackhide__ = True

_SAMPLES: Final = 32
"""Elements of each tensor that are compared, because writes through ``.data`` do not move the version counter."""

_COUNTS: Final = (37, 41, 43, 47, 53)
"""Numbers of elements that are compared where one step leads through all of a tensor's memory.

One is taken that divides no side, so that each step moves on to another column, too. With 32 samples, a step would be
a whole number of rows in most weights of models.
"""


def sample_of(tensor: Any) -> Any:
    """Return a view of a few evenly spread elements, as integers so that NaN equals itself."""
    return as_integers(_spread(tensor.detach()))


def _spread(tensor: Any) -> Any:
    """Return a one-dimensional view of a tensor's elements. A copy would hide later writes."""
    if tensor.is_contiguous():
        return tensor.view(-1)[:: _step(tensor.shape)]
    dimensions = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    span = 1 + sum((size - 1) * stride for size, stride in dimensions)
    if span == tensor.numel():  # for example transposed: its elements fill that stretch of memory
        step = _step([size for size, _ in sorted(dimensions, key=lambda each: each[1], reverse=True)])
        return tensor.as_strided((-(-span // step),), (step,))
    stride = sum((size - 1) // (_SAMPLES - 1) * stride for size, stride in dimensions)
    if stride:  # step along all dimensions at once
        return tensor.as_strided((_SAMPLES,), (stride,))
    return tensor.as_strided(*zip(max(dimensions, default=(1, 1)), strict=True))


def _step(sides: Sequence[int]) -> int:
    """Return the distance of samples in memory, such that they lie in different rows and columns.

    Args:
        sides: A tensor's sides, in the order of its memory: the last is that of neighbours.
    """
    sides = [side for side in sides if side > 1]
    count = next((count for count in _COUNTS if all(side % count for side in sides[:-1])), _COUNTS[-1])
    step = max(1, math.prod(sides) // count)
    columns = sides[-1] if sides else 1
    while columns // math.gcd(step, columns) < min(columns, count):  # after rounding, it leads to too few columns
        step -= 1
    return step


def alike(samples: Sequence[Any]) -> list[list[Any]]:
    """Return groups of samples of one device and dtype, in their order, so that each can be concatenated."""
    groups: dict[Any, list[Any]] = {}
    for sample in samples:
        groups.setdefault((sample.device, sample.dtype), []).append(sample)
    return list(groups.values())
