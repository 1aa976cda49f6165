"""What the objects of a model refer to, and which of its functions a tree cannot share with it."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__tracebackhide__ = True

PLAIN: Final = frozenset({bool, int, float, complex, str, bytes, type(None), type, range})
"""The kinds of values that refer to nothing and never change."""

EMPTY: Final = types.CellType()

_CONTAINERS: Final = frozenset({OrderedDict, dict, functools.partial, list, set, tuple, types.MethodType})
_REACHED_THROUGH: Final = _CONTAINERS | {types.BuiltinMethodType, types.FunctionType, weakref.ref}


def inside(thing: Any) -> Iterator[Any]:
    """Yield what an object refers to; for functions, only what two functions of the same code may differ in."""
    if isinstance(thing, dict):
        yield from thing
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        yield from thing
    elif isinstance(thing, types.FunctionType):
        yield from (cell.cell_contents for cell in thing.__closure__ or () if cell != EMPTY)
        yield from thing.__defaults__ or ()
        yield from (thing.__kwdefaults__ or {}).values()
    elif isinstance(thing, types.MethodType):
        yield from (thing.__func__, thing.__self__)
    elif isinstance(thing, types.BuiltinMethodType):
        yield thing.__self__
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, weakref.ref):
        yield thing()
    if not isinstance(thing, type | types.ModuleType | types.MethodType):  # a method has the dictionary of its function
        yield getattr(thing, "__dict__", None)


def refers_to_nothing(function: types.FunctionType) -> bool:
    """Return whether a function refers to nothing but plain values, as most functions of a library do."""
    return not function.__closure__ and all(
        type(each) in PLAIN or (type(each) is dict and not each) for each in inside(function)
    )


def functions_to_copy(model: Any) -> set[int]:
    """Return the ids of the functions of a model that a tree needs copies of.

    A tree copies what modules hold. So it copies each function that refers to such a thing, and what this function
    refers to. Functions that share a variable or a list with it are copied too, or they would no longer share it.
    """
    return _Functions(model).copied


class _Functions:
    """Finds the functions that a tree needs copies of.

    Attributes:
        copied: The ids of these functions.
    """

    def __init__(self, model: Any) -> None:
        import torch

        self._module = torch.nn.Module
        self._plain = PLAIN | {torch.dtype, torch.device, torch.Size}
        self._left: dict[int, types.FunctionType] = {}
        self._of_tree: set[int] = set()
        """The ids of all that the tree has copies of, also the variables of functions."""
        self.copied: set[int] = set()
        self._own([model])
        while found := [function for function in self._left.values() if self._reaches(function, set())]:
            for function in found:
                del self._left[id(function)]
                self.copied.add(id(function))
                self._of_tree.update(map(id, (function, *(function.__closure__ or ()))))
                self._own(inside(function))

    def _own(self, things: Iterable[Any]) -> None:
        """Note that the tree has copies of these, and of what they refer to, except for functions."""
        pending = list(things)
        while pending:
            thing = pending.pop()
            kind = type(thing)
            if kind in self._plain or id(thing) in self._of_tree or isinstance(thing, type | types.ModuleType):
                continue
            if kind is types.FunctionType:
                if id(thing) not in self.copied:
                    self._left[id(thing)] = thing
            elif kind is tuple:  # one without members is everywhere
                pending.extend(thing)
            elif isinstance(thing, self._module):
                self._of_tree.add(id(thing))
                pending.extend(each for each in vars(thing).values() if type(each) not in self._plain)
            elif kind in _CONTAINERS:
                self._of_tree.add(id(thing))
                pending.extend(inside(thing) if thing else ())
            elif kind not in _REACHED_THROUGH:
                self._of_tree.add(id(thing))

    def _reaches(self, thing: Any, seen: set[int]) -> bool:
        """Return whether something refers to a module, or to what the tree has a copy of."""
        kind = type(thing)
        if kind in self._plain or id(thing) in seen:
            return False
        if id(thing) in self._of_tree or isinstance(thing, self._module):
            return True
        if kind not in _REACHED_THROUGH:
            return False
        seen.add(id(thing))
        if kind is types.FunctionType and any(id(cell) in self._of_tree for cell in thing.__closure__ or ()):
            return True
        return any(self._reaches(each, seen) for each in inside(thing))
