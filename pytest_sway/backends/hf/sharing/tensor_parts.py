"""The tensors that a tensor is made of: itself, or inside of a wrapper, as torchao's quantized weights are, several."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__tracebackhide__ = True


def is_wrapper(tensor: Any) -> bool:
    """Whether a tensor has no memory of its own, and computes little but what its class foresees."""
    if type(tensor) in _plain_classes():
        return False
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(tensor))


@cache
def _plain_classes() -> frozenset[type]:
    """What nearly all tensors are; asking torch about each takes longer."""
    import torch

    return frozenset({torch.Tensor, torch.nn.Parameter})


def parts_of(tensor: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors with memory that a tensor is made of, by their names behind its own."""
    if not is_wrapper(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from parts_of(getattr(tensor, inner), f"{name}.{inner}")
