"""`SharedArrays`: detect changes to what trees share, and arrays that outlive a close.

Changes are those of the bytes in memory and of the classes of modules. Writes through MLX stay in their tree. Writes
around MLX do not: a numpy array made with ``copy=False`` or a tensor by DLPack shares the memory.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_sway.backends.local.leaks import Leak, chains_to

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__tracebackhide__ = True


class _Tree(NamedTuple):
    """Weak references to a tree and its arrays, by the identities of the original arrays."""

    model: weakref.ref[Any]
    arrays: dict[int, weakref.ref[Any]]

    def alive(self) -> set[int]:
        return {key for key, reference in self.arrays.items() if reference() is not None}


class SharedArrays:
    """The arrays of a base or an adapter, in its own model and in all trees that tests were given.

    It keeps none of them alive.

    Args:
        kind: The name of such an array in reports.
        model: The model that contains them.
        arrays: The arrays by name.

    Attributes:
        nbytes: Their size; an array in several places counts once.
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
        """Record a tree that a test is about to get.

        Args:
            tree: The tree.
            copies: The tree's objects, by the identities of the originals.
        """
        with self._lock:
            self._sums = self._sums or checksums(self._arrays())
            arrays = {key: weakref.ref(copies[key]) for key in self._names.keys() & copies.keys()}
            self._handed_out.append(_Tree(weakref.ref(tree), arrays))

    def changes(self) -> list[str]:
        """Return one line for each array whose contents have changed since the load; a change is reported from then on.

        The arrays are checked only if a test got a tree since the last check, or still has one.
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
        """Return how many bytes are still in memory."""
        return sum(self._sizes[key] for key in set().union(*(tree.alive() for tree in self._trees())))

    def roots(self) -> list[Any]:
        """Return the models that are still in memory, or the arrays if the models are gone."""
        alive = [tree for tree in self._trees() if tree.alive()]
        models = [model for tree in alive if (model := tree.model()) is not None]
        return models or [array for tree in alive for ref in tree.arrays.values() if (array := ref()) is not None]

    def _trees(self) -> list[_Tree]:
        return [self._original, *self._handed_out]

    def _arrays(self) -> dict[str, Any]:
        found = {self._names[key]: reference() for key, reference in self._original.arrays.items()}
        return {name: array for name, array in found.items() if array is not None}


def find_leak(shared: Iterable[SharedArrays]) -> Leak | None:
    """Return a leak if any of the arrays are still in memory after a garbage collection; else ``None``."""
    shared = list(shared)
    if not any(arrays.alive() for arrays in shared):
        return None
    gc.collect()
    nbytes = sum(arrays.alive() for arrays in shared)
    return Leak(nbytes, tuple(chains_to([root for arrays in shared for root in arrays.roots()]))) if nbytes else None


class ClassesRecord:
    """The ``__call__`` of the classes of some modules.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[Any]) -> None:
        self._calls: dict[Any, Any] = {type(module): type(module).__call__ for module in modules}

    def changes(self) -> list[str]:
        """Return one line for each class whose ``__call__`` was replaced."""
        return [
            f"class {kind.__module__}.{kind.__qualname__}: its __call__ was replaced"
            for kind, call in self._calls.items()
            if kind.__call__ != call  # not `is not`: a class without its own gives a new, equal object each time
        ]


def checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return the sum of each array's elements as integers. It detects a changed element, but not two swapped ones."""
    import mlx.core as mx

    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    sums: dict[str, Any] = {name: mx.sum(array.view(unsigned[array.dtype.size])) for name, array in arrays.items()}
    mx.eval(sums)
    return {name: int(total.item()) for name, total in sums.items()}
