"""The arrays that trees share: whether their contents are what they were, and whether they are gone after a close."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_sway.backends.local.leaks import Leak, chains_to
from pytest_sway.backends.mlx.model.snapshots import checksums

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__tracebackhide__ = True


class _Tree(NamedTuple):
    """Weak references to a tree and to its objects for the arrays, by the identities of the originals."""

    model: weakref.ref[Any]
    arrays: dict[int, weakref.ref[Any]]

    def alive(self) -> set[int]:
        return {key for key, reference in self.arrays.items() if reference() is not None}


class SharedArrays:
    """The arrays of a base or of an adapter, in its own model and in all trees that tests were handed.

    It keeps none of them alive.

    Args:
        kind: What a report calls one of them.
        model: The model that they stand in.
        arrays: The arrays by name.

    Attributes:
        nbytes: What they take; one that stands in several places counts once.
    """

    def __init__(self, kind: str, model: Any, arrays: Mapping[str, Any]) -> None:
        self._kind = kind
        self._names = {id(array): name for name, array in arrays.items()}
        self._sizes = {id(array): int(array.nbytes) for array in arrays.values()}
        self._original = _Tree(weakref.ref(model), {id(array): weakref.ref(array) for array in arrays.values()})
        self._handed_out: list[_Tree] = []
        self._lock = threading.Lock()
        self._sums: dict[str, int] = {}
        self._changes: list[str] = []
        self.nbytes = sum(self._sizes.values())

    def handed_out(self, tree: Any, copies: Mapping[int, Any]) -> None:
        """Take note of a tree that a test is about to get.

        Args:
            tree: The tree.
            copies: By the identities of the originals, what stands for them in it.
        """
        with self._lock:
            self._sums = self._sums or checksums(self._arrays())
            arrays = {key: weakref.ref(copies[key]) for key in self._names.keys() & copies.keys()}
            self._handed_out.append(_Tree(weakref.ref(tree), arrays))

    def changes(self) -> list[str]:
        """One line for each array whose contents are no longer what they were; what was found once stays so.

        They are looked at only if a test has been handed a tree since the last time, or still has one.
        """
        with self._lock:
            if self._handed_out and not self._changes:
                now = checksums(self._arrays())
                self._changes = [
                    f"{self._kind} {name}: contents changed" for name, found in now.items() if found != self._sums[name]
                ]
            self._handed_out = [tree for tree in self._handed_out if tree.alive()]
            return list(self._changes)

    def alive(self) -> int:
        """How many bytes are still in memory."""
        return sum(self._sizes[key] for key in set().union(*(tree.alive() for tree in self._trees())))

    def roots(self) -> list[Any]:
        """What is to be explained: the models that are still in memory, or the arrays where these are gone."""
        alive = [tree for tree in self._trees() if tree.alive()]
        models = [model for tree in alive if (model := tree.model()) is not None]
        return models or [array for tree in alive for ref in tree.arrays.values() if (array := ref()) is not None]

    def _trees(self) -> list[_Tree]:
        return [self._original, *self._handed_out]

    def _arrays(self) -> dict[str, Any]:
        found = {self._names[key]: reference() for key, reference in self._original.arrays.items()}
        return {name: array for name, array in found.items() if array is not None}


def find_leak(shared: Iterable[SharedArrays]) -> Leak | None:
    """Return what of some arrays is still in memory after a garbage collection; ``None`` if nothing is."""
    shared = list(shared)
    if not any(arrays.alive() for arrays in shared):
        return None
    gc.collect()
    nbytes = sum(arrays.alive() for arrays in shared)
    return Leak(nbytes, tuple(chains_to([root for arrays in shared for root in arrays.roots()]))) if nbytes else None
