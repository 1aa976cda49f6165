"""Find what holds objects in memory, and name it so that you can find it in your code."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import threading
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator


__tracebackhide__ = True

MAX_DEPTH: Final = 12
MAX_WIDTH: Final = 200
_OURS: Final = "pytest_sway"
_NAMES: Final = 3
"""The most globals of a module that are named if they hold an object in the same way."""


def chains_to(roots: list[Any], limit: int = 5, parts: Iterable[int] = ()) -> list[str]:
    """Describe the chains of references that hold some objects.

    Args:
        roots: The objects.
        limit: The most chains to return.
        parts: The identities of objects inside them. A call that uses one of these holds the whole, in places that
            can't be inspected.
    """
    search = _Search(roots)
    del roots
    found = search.chains(limit, parts)
    return found or ["nothing that Python's garbage collector can see (native code, such as an autograd graph)"]


class _Search:
    """A breadth-first search from objects to their referrers, up to one that has a name."""

    def __init__(self, targets: list[Any]) -> None:
        self._targets = targets
        self._next: dict[int, tuple[Any, int | None]] = {id(target): (target, None) for target in targets}
        self._found: dict[str, None] = {}  # an ordered set

    def chains(self, limit: int, parts: Iterable[int]) -> list[str]:
        """Return the chains found, shortest first."""
        used = dict.fromkeys(parts)
        self._note(call for frame, call in _running_frames() if call and _local_names(frame, used))
        frontier = list(self._targets)
        for _ in range(MAX_DEPTH):
            if not frontier or len(self._found) >= limit:
                break
            frontier = self._level(frontier)
        return list(self._found)[:limit]

    def _note(self, chains: Iterable[str]) -> None:
        self._found.update(dict.fromkeys(chains))

    def _level(self, frontier: list[Any]) -> list[Any]:
        below = {id(thing): thing for thing in frontier}
        for frame, call in _running_frames():  # the garbage collector does not see their locals
            found = _local_names(frame, below)
            self._note(call or " -> ".join([name, *self._path(key)]) for key, name in found)
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
        """Record ``referrer``; return whether the search ends there, as it does at one that has a name."""
        held = next((thing for thing in gc.get_referents(referrer) if id(thing) in below), None)
        if held is None:
            return True
        module = _module_of(referrer)
        if module is not None:
            self._note(self._globals(module, referrer, below))
            return True
        name = _name(referrer, held)
        if name is None:
            self._next[id(referrer)] = (referrer, id(held))
            return False
        self._note([" -> ".join([name, *self._path(id(held))])])
        return True

    def _globals(self, module: str, namespace: dict[str, Any], below: dict[int, Any]) -> Iterator[str]:
        """Yield a chain for the globals of a module that hold an object, one for each path."""
        names: dict[str, list[str]] = {}
        for name, value in namespace.items():
            if id(value) in below:
                names.setdefault(" -> ".join(self._path(id(value))), []).append(repr(name))
        for path, found in names.items():
            more = f" and {len(found) - _NAMES} more" if len(found) > _NAMES else ""
            yield f"module {module} global{'s'[: len(found) - 1]} {', '.join(found[:_NAMES])}{more} -> {path}"

    def _path(self, key: int | None) -> Iterator[str]:
        steps = []
        while key is not None:
            thing, key = self._next[key]
            steps.append(thing)
        for i, thing in enumerate(steps):
            # an object and its own dictionary are one step
            if not (type(thing) is dict and i and getattr(steps[i - 1], "__dict__", None) is thing):
                yield _kind(thing)


def _running_frames() -> Iterator[tuple[types.FrameType, str | None]]:
    """Yield the frames of all threads; those inside a call of ours in another thread come with a description of it."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for thread, innermost in sys._current_frames().items():
        own = thread == threading.get_ident()
        frames = [frame for frame in _frames_from(innermost) if not (own and _is_ours(frame))]
        ours = [number for number, frame in enumerate(frames) if _is_ours(frame)]
        call = f"a call that is still running in thread {names.get(thread, '?')!r}"
        for number, frame in enumerate(frames):
            yield frame, call if ours and number <= ours[-1] else None
    del innermost  # else this frame would hold itself, and its callers' targets


def _frames_from(innermost: types.FrameType) -> Iterator[types.FrameType]:
    frame: types.FrameType | None = innermost
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(thing: Any) -> bool:
    return isinstance(thing, types.FrameType) and str(thing.f_globals.get("__name__", "")).startswith(_OURS)


def _local_names(frame: types.FrameType, wanted: Collection[int]) -> list[tuple[int, str]]:
    """The local variables of a running frame that are among the wanted objects."""
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return []  # the body of a module or class: its names are in its namespace
    variables = frame.f_locals
    names = [(id(value), _frame_name(frame, name)) for name, value in variables.items() if id(value) in wanted]
    if type(variables) is dict:
        variables.clear()  # before Python 3.13, this copy stays with the frame and would be a holder
    return names


def _name(referrer: Any, held: Any) -> str | None:
    """A name by which you find ``referrer`` in your code; ``None`` if it has none."""
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
                    return _function_name("closure", function)
    return None


def _function_name(part: str, function: types.FunctionType) -> str | None:
    """The name of a function's part; ``None`` for our own functions, whose holder has a name that you know."""
    return None if str(function.__module__).startswith(_OURS) else f"{part} of {function.__qualname__}"


def _module_of(namespace: Any) -> str | None:
    """The name of the module whose namespace this is; ``None`` if it is none."""
    name = namespace.get("__name__") if type(namespace) is dict else None
    held = isinstance(name, str) and getattr(sys.modules.get(name), "__dict__", None) is namespace
    return name if held else None


_NAMED: Final[dict[type, Callable[[Any, Any], str | None]]] = {
    types.FrameType: _held_by_frame,
    types.CellType: _held_by_cell,
    types.ModuleType: lambda module, _: f"module {module.__name__}",
    types.FunctionType: lambda function, _: _function_name("default argument", function),
    functools._lru_cache_wrapper: lambda cached, _: f"functools.lru_cache of {getattr(cached, '__qualname__', '?')}",
    type: lambda kind, _: f"class {kind.__qualname__}",
}


def _kind(thing: Any) -> str:
    kind = type(thing)
    return kind.__name__ if kind.__module__ in ("builtins", "torch", "collections") else kind.__qualname__


@dataclass(frozen=True, slots=True)
class Leak:
    """Weights that are in memory after their backend was closed.

    Attributes:
        nbytes: The bytes that they take.
        holders: The chains of references that hold them, each from a name that you can find.
    """

    nbytes: int
    holders: tuple[str, ...]
