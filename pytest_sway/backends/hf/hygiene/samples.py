"""Samples a few elements of each tensor as views, which also show writes that torch does not count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.sharing.tensor_memory import as_integers

if TYPE_CHECKING:
    from collections.abc import Sequence

__tracebackhide__ = True

SAMPLES: Final = 32
"""Elements of each tensor that are compared, because writes through ``.data`` do not move the version counter."""


def sample_of(tensor: Any) -> Any:
    """Return a view of a few evenly spread elements, as integers so that NaN equals itself."""
    return as_integers(_spread(tensor.detach()))


def _spread(tensor: Any) -> Any:
    """Return a one-dimensional view of a tensor's elements. A copy would hide later writes."""
    if tensor.is_contiguous():
        return tensor.view(-1)[:: max(1, tensor.numel() // SAMPLES)]
    dimensions = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    span = 1 + sum((size - 1) * stride for size, stride in dimensions)
    if span == tensor.numel():  # for example transposed: its elements fill that stretch of memory
        return tensor.as_strided((min(span, SAMPLES),), (max(1, span // SAMPLES),))
    stride = sum((size - 1) // (SAMPLES - 1) * stride for size, stride in dimensions)
    if stride:  # step along all dimensions at once
        return tensor.as_strided((SAMPLES,), (stride,))
    return tensor.as_strided(*zip(max(dimensions, default=(1, 1)), strict=True))


def by_dtype(samples: Sequence[Any]) -> dict[Any, list[Any]]:
    """Group samples by dtype, in their order."""
    groups: dict[Any, list[Any]] = {}
    for sample in samples:
        groups.setdefault(sample.dtype, []).append(sample)
    return groups
