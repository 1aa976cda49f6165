"""Whether what trees still share is what it was: the bytes in memory, and the classes of modules.

Writes through MLX stay in their tree. What goes around it does not: an array of numpy made with ``copy=False``, or a
tensor by DLPack, has the same memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__tracebackhide__ = True


class ClassesRecord:
    """What the classes of some modules computed with.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[Any]) -> None:
        self._calls: dict[Any, Any] = {type(module): type(module).__call__ for module in modules}

    def changes(self) -> list[str]:
        """One line for each class that computes with something else now."""
        return [
            f"class {kind.__module__}.{kind.__qualname__}: its __call__ was replaced"
            for kind, call in self._calls.items()
            if kind.__call__ != call  # for a class without one, Python makes a new object each time, equal to the last
        ]


def checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return the sum of each array's elements, taken as integers: one other element changes it, two swapped do not."""
    import mlx.core as mx

    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    sums: dict[str, Any] = {name: mx.sum(array.view(unsigned[array.dtype.size])) for name, array in arrays.items()}
    mx.eval(sums)
    return {name: int(total.item()) for name, total in sums.items()}
