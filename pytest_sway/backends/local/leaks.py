"""Who holds some tensors: from the garbage collector's referrers to names that a person can find in their code."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

MAX_DEPTH: Final = 12
MAX_WIDTH: Final = 200
_OURS: Final = "pytest_sway"


def chains_to(roots: list[Any], limit: int = 5) -> list[str]:
    """Describe by what chains of references some objects are held.

    Args:
        roots: The objects.
        limit: The most chains to return.
    """
    search = _Search(roots)
    del roots
    found = search.chains(limit)
    return found or ["nothing that Python's garbage collector knows of (native code, such as an autograd graph)"]


class _Search:
    """A breadth-first search from objects to what refers to them, up to something with a name."""

    def __init__(self, targets: list[Any]) -> None:
        self._targets = targets
        self._next: dict[int, tuple[Any, int | None]] = {id(target): (target, None) for target in targets}
        self._found: list[str] = []

    def chains(self, limit: int) -> list[str]:
        """The chains that were found, shortest first."""
        frontier = list(self._targets)
        for _ in range(MAX_DEPTH):
            if not frontier or len(self._found) >= limit:
                break
            frontier = self._level(frontier)
        return list(dict.fromkeys(self._found))[:limit]

    def _level(self, frontier: list[Any]) -> list[Any]:
        below = {id(thing): thing for thing in frontier}
        for frame in _running_frames():  # which the garbage collector does not look into
            self._found += [" -> ".join([name, *self._path(key)]) for key, name in _local_names(frame, below)]
        own = {id(frontier), id(below), id(self._next), id(self._targets), id(vars(self))}
        own |= {id(entry) for entry in self._next.values()}
        upper = []
        for referrer in gc.get_referrers(*frontier):
            if id(referrer) in own or id(referrer) in self._next or _is_ours(referrer):
                continue
            if not self._visit(referrer, below):
                upper.append(referrer)
        return upper[:MAX_WIDTH]

    def _visit(self, referrer: Any, below: dict[int, Any]) -> bool:
        """Note by what ``referrer`` holds; return whether it has a name, so that the search ends there."""
        held = next((thing for thing in gc.get_referents(referrer) if id(thing) in below), None)
        if held is None:
            return True
        name = _name(referrer, held)
        if name is None:
            self._next[id(referrer)] = (referrer, id(held))
            return False
        self._found.append(" -> ".join([name, *self._path(id(held))]))
        return True

    def _path(self, key: int | None) -> Iterator[str]:
        steps = []
        while key is not None:
            thing, key = self._next[key]
            steps.append(thing)
        for i, thing in enumerate(steps):
            # an object and its own dictionary are one step
            if not (type(thing) is dict and i and getattr(steps[i - 1], "__dict__", None) is thing):
                yield _kind(thing)


def _running_frames() -> Iterator[types.FrameType]:
    for frame in sys._current_frames().values():
        current: types.FrameType | None = frame
        while current is not None:
            if not _is_ours(current):
                yield current
            current = current.f_back


def _is_ours(thing: Any) -> bool:
    return isinstance(thing, types.FrameType) and str(thing.f_globals.get("__name__", "")).startswith(_OURS)


def _local_names(frame: types.FrameType, wanted: dict[int, Any]) -> list[tuple[int, str]]:
    """The local variables of a running frame that are among the objects wanted."""
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return []  # a module's or class's body, whose names are found in its namespace
    variables = frame.f_locals
    names = [(id(value), _frame_name(frame, name)) for name, value in variables.items() if id(value) in wanted]
    if type(variables) is dict:
        variables.clear()  # before Python 3.13 it is a copy that stays with the frame, and would itself be a holder
    return names


def _name(referrer: Any, held: Any) -> str | None:
    """How a person would find ``referrer`` in their code; ``None`` if it is just another object."""
    if type(referrer).__name__ == "FixtureDef":
        return f"fixture {getattr(referrer, 'argname', '?')!r}"
    for kind, describe in _NAMED.items():
        if isinstance(referrer, kind):
            return describe(referrer, held)
    return None


def _held_by_frame(frame: types.FrameType, held: Any) -> str:
    return _frame_name(frame, next((name for name, value in frame.f_locals.items() if value is held), None))


def _frame_name(frame: types.FrameType, local: str | None) -> str:
    where = f"frame {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
    kept = "sys.last_traceback -> " if _in_last_traceback(frame) else ""
    return f"{kept}{where}" + (f" local {local!r}" if local else "")


def _in_last_traceback(frame: types.FrameType) -> bool:
    traceback = getattr(sys, "last_traceback", None)
    while traceback is not None:
        if traceback.tb_frame is frame:
            return True
        traceback = traceback.tb_next
    return False


def _held_by_cell(cell: types.CellType, _held: Any) -> str | None:
    for closure in gc.get_referrers(cell):
        if isinstance(closure, tuple):
            for function in gc.get_referrers(closure):
                if isinstance(function, types.FunctionType) and function.__closure__ is closure:
                    return f"closure of {function.__qualname__}"
    return None


def _held_by_dict(held_in: dict[Any, Any], held: Any) -> str | None:
    name = held_in.get("__name__")
    if isinstance(name, str) and getattr(sys.modules.get(name), "__dict__", None) is held_in:
        key = next((key for key, value in held_in.items() if value is held), None)
        return f"module {name} global {key!r}"
    return None


_NAMED: Final[dict[type, Callable[[Any, Any], str | None]]] = {
    types.FrameType: _held_by_frame,
    types.CellType: _held_by_cell,
    dict: _held_by_dict,
    types.ModuleType: lambda module, _: f"module {module.__name__}",
    types.FunctionType: lambda function, _: f"default argument of {function.__qualname__}",
    functools._lru_cache_wrapper: lambda cached, _: f"functools.lru_cache of {getattr(cached, '__qualname__', '?')}",
    type: lambda kind, _: f"class {kind.__qualname__}",
}


def _kind(thing: Any) -> str:
    kind = type(thing)
    return kind.__name__ if kind.__module__ in ("builtins", "torch", "collections") else kind.__qualname__


@dataclass(frozen=True, slots=True)
class Leak:
    """Weights that outlived their backend.

    Attributes:
        nbytes: How much memory they hold.
        holders: By what chains of references they are held, each from a name that a person can find.
    """

    nbytes: int
    holders: tuple[str, ...]
