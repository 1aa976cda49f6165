"""Locking helpers: `atomic` methods, calls made `holding` a lock, and `OneShotEvent` for those who wait.

All locks are taken and released here, by ``with`` on a lock written in C, which no interrupt can split. An atomic
method never waits: an interrupt during the wait of a `threading.Condition` can leave its lock locked, or release
another thread's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

__tracebackhide__ = True

P = ParamSpec("P")
R = TypeVar("R")


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
