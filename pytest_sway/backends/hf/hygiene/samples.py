"""A few elements of each tensor, as views: what is written into it shows, by whatever way it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__tracebackhide__ = True

SAMPLES: Final = 32
"""Elements of each tensor that are compared: writes through ``.data`` move no version counter."""


def sample_of(tensor: Any) -> Any:
    """A view of a few elements, evenly spread, as integers: so that a NaN equals itself."""
    import torch

    sample = _spread(tensor.detach())
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sample.view(integers[sample.element_size()]) if sample.element_size() in integers else sample


def _spread(tensor: Any) -> Any:
    """A view on elements of a tensor in one dimension; never a copy, which would hide all that is written later."""
    if tensor.is_contiguous():
        return tensor.view(-1)[:: max(1, tensor.numel() // SAMPLES)]
    dimensions = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    span = 1 + sum((size - 1) * stride for size, stride in dimensions)
    if span == tensor.numel():  # transposed, say: its elements are all there is in that stretch of memory
        return tensor.as_strided((min(span, SAMPLES),), (max(1, span // SAMPLES),))
    stride = sum((size - 1) // (SAMPLES - 1) * stride for size, stride in dimensions)
    if stride:  # a walk with a step of its own in each dimension
        return tensor.as_strided((SAMPLES,), (stride,))
    return tensor.as_strided(*zip(max(dimensions, default=(1, 1)), strict=True))


def by_dtype(samples: Sequence[Any]) -> dict[Any, list[Any]]:
    """Samples by their dtype, in their order."""
    groups: dict[Any, list[Any]] = {}
    for sample in samples:
        groups.setdefault(sample.dtype, []).append(sample)
    return groups
