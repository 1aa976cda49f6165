"""Detect changes to what trees share: the bytes in memory, and the classes of modules.

Writes through MLX stay in their tree. Writes around MLX do not: a numpy array made with ``copy=False`` or a tensor by
DLPack shares the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__tracebackhide__ = True


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
