"""Whether weights are gone after a close, and if not, how much memory is still held."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.holders import chains_to
from pytest_sway.backends.hf.memory import Leak

if TYPE_CHECKING:
    from collections.abc import Iterable

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class WeightsWatch:
    """Weak references to some arrays and to the modules that hold them.

    Args:
        modules: The outermost modules.
        arrays: The arrays; none of them is kept alive.
    """

    def __init__(self, modules: Iterable[Any], arrays: Iterable[Any]) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._arrays = [weakref.ref(array) for array in arrays]

    def arrays(self) -> list[Any]:
        """The arrays that are still in memory."""
        return [array for reference in self._arrays if (array := reference()) is not None]

    def roots(self) -> list[Any]:
        """What is to be explained: the modules that are still in memory, or the arrays where these are gone."""
        modules = [module for reference in self._modules if (module := reference()) is not None]
        return modules or self.arrays()


def find_leak(watches: Iterable[WeightsWatch]) -> Leak | None:
    """Return what of the watched arrays is still in memory after a garbage collection; ``None`` if nothing is."""
    watches = list(watches)
    if not any(watch.arrays() for watch in watches):
        return None
    gc.collect()
    nbytes = sum(array.nbytes for watch in watches for array in watch.arrays())
    return Leak(nbytes, tuple(chains_to([root for watch in watches for root in watch.roots()]))) if nbytes else None
