"""The memory of one tensor: how it can be shared, new tensors on it, and whether two tensors are the same."""

from __future__ import annotations

import copy
from enum import Enum, auto
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pytest_sway.backends.hf.sharing.mapped_files import FilePart
from pytest_sway.backends.hf.sharing.tensor_parts import is_wrapper, parts_of, scales_of

if TYPE_CHECKING:
    from pytest_sway.backends.hf.sharing.mapped_files import MappedFiles

__tracebackhide__ = True

_ALIGNMENT: Final = 64
"""Bytes; torch allocates memory at multiples of this."""


_CLONED_LAZILY: Final = ("cpu", "cuda")
"""Types of devices on which a pass over lazy clones copies nothing, as tests/gpu measures."""


class Method(Enum):
    """How a tensor is shared, unless its memory is a mapped file."""

    COPIED = auto()
    LAZY_CLONE = auto()
    EXPOSED = auto()


Way: TypeAlias = Method | FilePart
"""How a tensor is shared."""


def way_of(tensor: Any, files: MappedFiles | None, *, quantized: bool = False) -> Way:
    """Return how to share a tensor. If its memory allows neither way, move it to memory of torch's.

    Args:
        tensor: The tensor.
        files: The mapped files; ``None`` if it is in none of them.
        quantized: Whether it is a parameter or buffer of a quantized model.
    """
    if _is_exposed(tensor) or (quantized and _is_packed(tensor)):
        return Method.EXPOSED
    if lazy_clone(tensor) is not None:
        return Method.LAZY_CLONE
    if tensor.device.type != "cpu":
        return Method.EXPOSED
    part = None if files is None else files.part_of(*memory_of(tensor))
    if part is None:
        tensor.data = _moved(tensor)
        return Method.LAZY_CLONE
    return part


def own_before_write(tensor: Any) -> None:
    """Give a tree's tensor memory of its own, unless torch or its class does so when somebody writes to it."""
    if not is_plain(tensor):
        return
    if not (_is_exposed(tensor) or _is_packed(tensor)) and lazy_clone(tensor) is not None:
        return
    tensor.data = _moved(tensor) if tensor.device.type == "cpu" else tensor.detach().clone()


def _moved(tensor: Any) -> Any:
    """Copy a tensor's memory to an address with the same alignment, by which kernels choose how they sum."""
    import torch

    source = tensor.untyped_storage()
    uneven = address_of(tensor) % _ALIGNMENT
    uneven -= uneven % tensor.element_size()
    storage = torch.empty(source.nbytes() + uneven, dtype=torch.uint8).untyped_storage()
    storage[uneven:].copy_(source)
    offset = tensor.storage_offset() + uneven // tensor.element_size()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.size(), tensor.stride())


def _is_exposed(tensor: Any) -> bool:
    return not is_plain(tensor) or tensor.device.type not in _CLONED_LAZILY or not _can_clone_lazily()


def _is_packed(tensor: Any) -> bool:
    """Return whether a tensor off the CPU may be a quantized weight: integers of up to 32 bits, or floats of 8 bits.

    Kernels outside torch, such as Triton's, take its address and so end a lazy clone, although they only read.
    """
    import torch

    if tensor.device.type == "cpu":
        return False
    if tensor.is_floating_point():
        return bool(tensor.element_size() == 1)
    return tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)


def is_open_to_writes(tensor: Any, way: Way) -> bool:
    """Return whether a write in one tree can change the memory of all trees.

    On a CUDA device, torch's operations on lists of tensors, with which its optimizers step, do not end a lazy clone
    before they write to it.
    """
    return way is Method.EXPOSED or (way is Method.LAZY_CLONE and tensor.device.type != "cpu")


def is_plain(tensor: Any) -> bool:
    """Return whether a tensor is of torch's own classes and has a storage with strides."""
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _has_memory(tensor: Any) -> bool:
    """Return whether a tensor of any class has memory of its own, with strides."""
    import torch

    return tensor.layout is torch.strided and not is_wrapper(tensor) and address_of(tensor) != 0


def _can_clone_lazily() -> bool:
    import torch

    return hasattr(torch, "_lazy_clone") and hasattr(torch._C, "_data_address")


def lazy_clone(tensor: Any) -> Any | None:
    """Return a storage on the same memory, which torch copies on the first write to either; ``None`` if it cannot."""
    import torch

    try:
        return torch._lazy_clone(tensor.detach()).untyped_storage()
    except RuntimeError:  # memory that torch did not allocate itself
        return None


def address_of(tensor: Any) -> int:
    """Return the address of a tensor's storage. Unlike ``data_ptr()``, this does not end a lazy clone."""
    import torch

    address = getattr(torch._C, "_data_address", None)
    return int(tensor.untyped_storage().data_ptr() if address is None else address(tensor))


def memory_of(tensor: Any) -> tuple[int, int]:
    """Return the address and the length in bytes of a tensor's storage."""
    return address_of(tensor), tensor.untyped_storage().nbytes()


def on_storage(storage: Any, tensor: Any) -> Any:
    """Return a tensor like another one, on another storage."""
    import torch

    layout = tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, *layout)


def like(tensor: Any, data: Any) -> Any:
    """Return ``data`` as a parameter or tensor with the attributes of ``tensor``."""
    import torch

    if isinstance(tensor, torch.nn.Parameter):
        made: Any = torch.nn.Parameter(data, requires_grad=tensor.requires_grad)
    else:
        made = data
    if vars(tensor):
        vars(made).update(vars(tensor))
    return made


def same_memory(tensor: Any) -> Any:
    """Return a tensor of the same class on the same memory."""
    import torch

    if is_plain(tensor):
        return like(tensor, tensor.detach())
    if is_wrapper(tensor):
        return like(tensor, tensor.detach())  # its class makes a new wrapper around the same tensors
    # `detach` shares the count of writes; `data` has a count of its own.
    made: Any = torch.Tensor._make_subclass(type(tensor), tensor.detach(), tensor.requires_grad)
    vars(made).update((name, _attribute(value)) for name, value in vars(tensor).items())
    return made


def _attribute(value: Any, *, deeper: bool = True) -> Any:
    """Return a new object for what a quantized tensor has besides its contents; tensors in it stay the same.

    What is in the object is new too, one level deep: a state of bitsandbytes has another one for its scales.
    """
    if _is_tensor(value):
        return value.detach()  # it shares the count of writes
    if not hasattr(value, "__dict__") or callable(value):
        return value
    made = copy.copy(value)
    if deeper and made is not value:
        inner = {name: _attribute(part, deeper=False) for name, part in vars(value).items() if not _is_tensor(part)}
        vars(made).update(inner)
    return made


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def is_same(theirs: Any, ours: Any) -> bool:
    """Return whether a tree's tensor still equals the model's."""
    if (theirs.shape, theirs.dtype, theirs.device) != (ours.shape, ours.dtype, ours.device):
        return False
    if type(theirs) is type(ours) and is_wrapper(ours):
        pairs = zip(parts_of(theirs), parts_of(ours), strict=True)
        return all(its == other and is_same(one, another) for (its, one), (other, another) in pairs)
    if not is_plain(ours) or not is_plain(theirs):
        return bool((theirs == ours).all()) and _has_same_scales(theirs, ours)
    return is_same_memory(theirs, ours) or _equal_bits(theirs, ours)


def _has_same_scales(theirs: Any, ours: Any) -> bool:
    pairs = list(zip_longest(scales_of(theirs), scales_of(ours)))
    return all(one is not None and other is not None and is_same(one, other) for one, other in pairs)


def is_same_memory(theirs: Any, ours: Any) -> bool:
    """Return whether two tensors are the same view of the same memory."""
    if not (is_plain(ours) and is_plain(theirs)) and not (type(theirs) is type(ours) and _has_memory(ours)):
        return False
    return address_of(theirs) == address_of(ours) and _layout(theirs) == _layout(ours)


def _layout(tensor: Any) -> tuple[Any, ...]:
    return tensor.device, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()


def _equal_bits(one: Any, other: Any) -> bool:
    if one.is_complex():
        return bool(one.equal(other))
    return bool(as_integers(one.detach().contiguous()).equal(as_integers(other.detach().contiguous())))


def as_integers(tensor: Any) -> Any:
    """Return a view of a tensor's elements as integers, so that NaN equals itself; the tensor if none have its size."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()]) if tensor.element_size() in integers else tensor
