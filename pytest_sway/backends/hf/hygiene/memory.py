"""Measures the memory of weights, finds weights that a close did not free, and returns freed memory to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.sharing.tensor_memory import address_of
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of
from pytest_sway.backends.local.leaks import Leak, chains_to

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__tracebackhide__ = True


class WeightsWatch:
    """Weak references to the memory of some tensors.

    Args:
        tensors: The tensors to watch; they are not kept alive.
    """

    def __init__(self, tensors: Iterable[Any]) -> None:
        weak_reference: Any = import_module("torch.multiprocessing.reductions").StorageWeakRef
        storages = {}
        for tensor in (part for whole in tensors for _, part in parts_of(whole)):
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:
                memory = (address_of(tensor), storage.nbytes())
                storages[storage._cdata] = (weak_reference(storage), memory)
        self._storages: list[tuple[Any, tuple[int, int]]] = list(storages.values())

    def alive(self) -> dict[int, tuple[int, int]]:
        """Return address and length in bytes of each living storage's memory, by the storage's own address."""
        return {reference.cdata: memory for reference, memory in self._storages if not reference.expired()}

    def alive_bytes(self) -> int:
        """Return the bytes still in memory; memory with several storages counts once."""
        return sum(dict(self.alive().values()).values())


def measured(tensors: Iterable[Any]) -> int:
    """Return the bytes of some tensors; tensors at the same address count once."""
    places: dict[tuple[Any, int], int] = {}
    for tensor in (part for whole in tensors for _, part in parts_of(whole)):
        place = (tensor.device, address_of(tensor) + tensor.storage_offset() * tensor.element_size())
        places[place] = max(places.get(place, 0), tensor.nbytes)
    return sum(places.values())


def find_leak(watches: Iterable[WeightsWatch]) -> Leak | None:
    """Return the watched weights that a garbage collection does not free; ``None`` if there are none."""
    watches = list(watches)
    if not any(watch.alive() for watch in watches):
        return None
    gc.collect()
    alive = {storage: memory for watch in watches for storage, memory in watch.alive().items()}
    nbytes = sum(dict(alive.values()).values())  # trees have their own storages on the same memory
    return Leak(nbytes, tuple(holders_of(alive))) if alive else None


def holders_of(storages: Iterable[int], limit: int = 5) -> list[str]:
    """Describe the chains of references that keep the tensors on some storages alive.

    Args:
        storages: Addresses of storages (`torch.UntypedStorage._cdata`).
        limit: The most chains to return.

    Returns:
        Chains such as ``module tests.test_x global 'KEEP' -> list -> PeftModel``.
    """
    roots, parts = _outermost_holders(set(storages))
    return chains_to(roots, limit, parts)


def _outermost_holders(storages: set[int]) -> tuple[list[Any], set[int]]:
    """Return the outermost holders, and the ids of all modules and tensors that they hold.

    Outermost holders are modules that contain such tensors and are in no other such module, and tensors in no module.
    """
    import torch

    tensors, modules = [], []
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, torch.Tensor):
            if _on_storage(thing, storages):
                tensors.append(thing)
        elif issubclass(kind, torch.nn.Module) and "_modules" in vars(thing):
            modules.append(thing)
    wanted = {id(tensor) for tensor in tensors}
    holding = {id(module): module for module in modules if any(id(tensor) in wanted for tensor in _own_tensors(module))}
    inside = {id(tensor) for module in holding.values() for tensor in _own_tensors(module)}
    outer, parents = dict(holding), _parents(modules)
    while True:
        wanted |= outer.keys()
        up = {id(parent): parent for module in outer.values() for parent in parents.get(id(module), ())}
        kept = {key: module for key, module in outer.items() if key not in parents}
        if up.keys() <= kept.keys():
            break
        outer = kept | up
    return [*outer.values(), *(tensor for tensor in tensors if id(tensor) not in inside)], wanted


def _own_tensors(module: Any) -> Iterator[Any]:
    yield from module._parameters.values()
    yield from module._buffers.values()


def _on_storage(tensor: Any, storages: set[int]) -> bool:
    try:
        return tensor.untyped_storage()._cdata in storages
    except (RuntimeError, NotImplementedError):  # a tensor without storage, such as a sparse or a fake one
        return False


def _parents(modules: list[Any]) -> dict[int, list[Any]]:
    parents: dict[int, list[Any]] = {}
    for module in modules:
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
    return parents


_LARGEST_KEPT: Final = 20 * 2**20
"""Bytes: less than a chunk of logits (`batching.Limits.logits_bytes`). Where glibc keeps those, too, the memory of
freed logits can be too small for the next by the few bytes that aligned memory takes. Peak memory then grows by a chunk
or two."""


def collect(device_type: str) -> None:
    """Collect garbage, and return unused memory of the accelerator and the heap."""
    gc.collect()
    return_memory(device_type)


def return_memory(device_type: str) -> None:
    """Return unused memory of the accelerator and the heap."""
    import torch

    if device_type == "cuda":
        torch.cuda.empty_cache()
    elif device_type == "mps":
        torch.mps.empty_cache()
    trim_heap()


@cache
def reuse_freed_memory() -> None:
    """Make glibc keep what one operation frees for the next, up to `_LARGEST_KEPT` bytes.

    By default glibc maps each block over a threshold by itself, and returns free memory beyond twice as much. Then each
    result faults in all of its pages again. The threshold rises to the size of a mapped block when that is freed, up to
    32 MiB (mallopt(3), M_MMAP_THRESHOLD). So this allocates and frees a block once per process. Other blocks, such as
    converted weights and the first logits, may raise it further. A fixed threshold would keep logits out of the heap,
    and cost 2% of the scoring of long texts.
    """
    import torch

    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


def trim_heap() -> None:
    """Make glibc return freed memory.

    Otherwise it keeps four fifths of a base that was converted while loading. After a forward pass, small results lie
    between free blocks, so that large ones find no room.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
