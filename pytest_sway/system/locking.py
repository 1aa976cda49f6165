"""What runs one at a time: `atomic` methods of an object, calls made `holding` a lock, and how to wait between them.

They are apart from their users so that locks are taken and given back in one place, by a ``with`` statement on a lock
written in C, which an interrupt cannot split. Nobody waits inside an atomic method: an interrupt in the wait of a
`threading.Condition` can leave its lock to nobody, or take it from another thread.
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
    """Set once, for all who wait for it."""

    def __init__(self) -> None:
        self._silence = threading.Lock()
        self._silence.acquire()

    def set(self) -> None:
        """Wake who waits, and let who waits later through at once."""
        self._silence.release()

    def wait(self, timeout: float) -> None:
        """Wait until it is set, or for ``timeout`` seconds; returns early if another who waited was interrupted."""
        if self._silence.acquire(timeout=timeout):
            self._silence.release()  # for the next
