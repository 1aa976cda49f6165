"""How much memory weights take, and whether they are gone after a close."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.holders import holders_of
from pytest_sway.backends.hf.shared_memory import address_of
from pytest_sway.backends.hf.tensor_parts import parts_of

if TYPE_CHECKING:
    from collections.abc import Iterable

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


_LARGEST_KEPT: Final = 20 * 2**20
"""Below what logits have that are made at once (`batches.Limits`). Kept, they would go the same way as all else: small
results take a place in their memory, the next ones do not fit in there, and peak memory is half as much again."""


class WeightsWatch:
    """Weak references to the memory of some tensors, whichever Python objects refer to it.

    Args:
        tensors: What is watched; it is not kept alive.
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
        """Address and length of the memory of each storage that is still there, by the storage's own address."""
        return {reference.cdata: memory for reference, memory in self._storages if not reference.expired()}

    def alive_bytes(self) -> int:
        """How many bytes are still in memory, each place counted once."""
        return sum(dict(self.alive().values()).values())


@dataclass(frozen=True, slots=True)
class Leak:
    """Weights that outlived their backend.

    Attributes:
        nbytes: How much memory they hold.
        holders: By what chains of references they are held, each from a name that a person can find.
    """

    nbytes: int
    holders: tuple[str, ...]


def measured(tensors: Iterable[Any]) -> int:
    """Return the bytes of some tensors; what is in the same place counts once."""
    places: dict[tuple[Any, int], int] = {}
    for tensor in (part for whole in tensors for _, part in parts_of(whole)):
        place = (tensor.device, address_of(tensor) + tensor.storage_offset() * tensor.element_size())
        places[place] = max(places.get(place, 0), tensor.nbytes)
    return sum(places.values())


def find_leak(watches: Iterable[WeightsWatch]) -> Leak | None:
    """Return what of the watched weights is still in memory after a garbage collection; ``None`` if nothing is."""
    watches = list(watches)
    if not any(watch.alive() for watch in watches):
        return None
    gc.collect()
    alive = {storage: memory for watch in watches for storage, memory in watch.alive().items()}
    nbytes = sum(dict(alive.values()).values())  # trees have storages of their own on the same memory
    return Leak(nbytes, tuple(holders_of(alive))) if alive else None


def collect(device_type: str) -> None:
    """Free what nobody refers to any more, and give unused memory back, the accelerator's and the heap's."""
    import torch

    gc.collect()
    if device_type == "cuda":
        torch.cuda.empty_cache()
    elif device_type == "mps":
        torch.mps.empty_cache()
    trim_heap()


@cache
def reuse_freed_memory() -> None:
    """Have glibc keep what one operation of a pass frees for the next, but for what is very large.

    It maps whatever is over a threshold anew each time, and gives back what is free beyond twice as much: then all
    pages of every result are faulted in again. The threshold rises to the size of what was mapped and is freed, up to
    32 MiB (mallopt(3), M_MMAP_THRESHOLD). So memory that nobody touches is asked for and freed, once in a process.
    """
    import torch

    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


def trim_heap() -> None:
    """Have glibc give freed memory back.

    Of a base that was converted while loading, it keeps four fifths resident otherwise; of what a forward pass used,
    small results that lie in between keep the rest from being used for anything large.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
