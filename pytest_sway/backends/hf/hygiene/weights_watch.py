"""Measures the memory of weights, and finds weights that a close did not free."""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.hygiene.holders import holders_of
from pytest_sway.backends.hf.sharing.tensor_memory import address_of
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of
from pytest_sway.backends.local.leaks import Leak

if TYPE_CHECKING:
    from collections.abc import Iterable

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
