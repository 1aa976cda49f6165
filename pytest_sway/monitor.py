"""`atomic`: the methods of an object that run one at a time.

It is apart from its users so that the lock is taken and given back in one place, by a ``with`` statement on a lock
written in C, which an interrupt cannot split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

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
