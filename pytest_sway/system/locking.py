"""Locking helpers: `atomic` methods, calls made `holding` a lock, `OneShotEvent` for those who wait, and `close_all`.

All locks are taken and released here, by ``with`` on a lock written in C, which no interrupt can split. An atomic
method never waits: an interrupt during the wait of a `threading.Condition` can leave its lock locked, or release
another thread's. A forked child must not wait for its parent's locks nor close its models, so it gets handlers.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from itertools import compress, repeat
from types import MethodType
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

__tracebackhide__ = True

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Monitor(Protocol):
    """An object with a lock of its own, a `threading.Lock`."""

    _lock: Any


M = TypeVar("M", bound=Monitor)


def atomic(step: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Make a method run under its object's lock; one atomic method must not call another."""

    @functools.wraps(step)
    def locked(self: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return step(self, *args, **kwargs)

    return locked


def holding(lock: threading.Lock, step: Callable[[], R]) -> R:
    """Return what ``step`` returns, called under ``lock``."""
    with lock:
        return step()


def close_all(
    things: list[T],
    close: Callable[[T], object],
    again: Callable[[T, BaseException], bool] = lambda _thing, _interrupt: True,
) -> None:
    """Call ``close`` with each thing, and remove those that were closed, or whose close raised an `Exception`.

    Args:
        things: The things.
        close: Closes one.
        again: Returns whether a thing stays in the list after an interrupt, so that ``close`` is called for it again.
    """
    while things:
        ended: list[None] = []
        try:  # in C, so that no interrupt can come between the end of a close and the removal
            closed: Iterator[Any] = map(close, things[:1])
            things[:1] = compress(closed, map(ended.append, repeat(None)))
        except Exception:
            del things[0]
            raise
        except BaseException as interrupt:
            if not again(things[0], interrupt):
                del things[0]
            raise
        if not ended:  # `map` takes its StopIteration for the end
            raise RuntimeError("a close raised StopIteration")


class OneShotEvent:
    """An event that is set once, for all threads that wait for it."""

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        """Wake all waiting threads; later waits return at once."""
        self._unset.release()

    def wait(self, timeout: float) -> None:
        """Wait until it is set, at most ``timeout`` seconds; return early if another waiting thread is interrupted."""
        if self._unset.acquire(timeout=timeout):
            self._unset.release()  # wakes the next thread


_methods: Final[WeakKeyDictionary[Any, Callable[[Any], None]]] = WeakKeyDictionary()
"""The method that a child calls, by its object. It is global because handlers registered with `os` can't be removed."""


def call_in_forked_child(method: Callable[[], None]) -> None:
    """Register a bound ``method`` for every child forked from now on to call; one per object, while that lives."""
    bound = cast("MethodType", method)
    _methods[bound.__self__] = bound.__func__


def _in_child() -> None:
    for owner, method in list(_methods.items()):
        method(owner)


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_in_child)
