"""Finds the tensors inside wrapper tensors, such as torchao's quantized weights, and beside bitsandbytes' own."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__tracebackhide__ = True


def is_wrapper(tensor: Any) -> bool:
    """Return whether a tensor has no memory of its own, and supports only what its class implements."""
    if type(tensor) in _plain_classes():
        return False
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(tensor))


@cache
def _plain_classes() -> frozenset[type]:
    """Return the classes of nearly all tensors; asking torch about each tensor takes longer."""
    import torch

    return frozenset({torch.Tensor, torch.nn.Parameter})


def parts_of(tensor: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors with memory that make up a tensor, by name: ``name`` and the attributes that lead to it."""
    if not is_wrapper(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from parts_of(getattr(tensor, inner), f"{name}.{inner}")


def scales_of(tensor: Any) -> Iterator[Any]:
    """Yield the tensors that bitsandbytes keeps beside a quantized weight, as attributes of it."""
    import torch

    state = getattr(tensor, "quant_state", None)
    beside = [getattr(tensor, "SCB", None)]
    while state is not None:
        beside += [state.absmax, state.code, state.offset]
        state = getattr(state, "state2", None)  # a repacked state has none
    yield from (each for each in beside if isinstance(each, torch.Tensor))
