"""Python's garbage: variables that keep models alive after an error, and collections that take time while one loads."""

from __future__ import annotations

import gc
import operator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__tracebackhide__ = True

_NEVER: Final = 2**30


@contextmanager
def no_full_collections() -> Iterator[None]:
    """Collect young garbage only, while libraries are imported or a model is loaded.

    Both make hundreds of thousands of objects that stay, so Python would scan all objects several times. The garbage of
    an import that lies between objects that stay would also make each later collection slower. The full collection that
    was put off does not come at once in the code that follows: Python counts anew.
    """
    before = gc.get_threshold()
    if before[2] == _NEVER:  # the caller or another thread is within, and restores them
        yield
        return
    during = (*before[:2], _NEVER)
    try:
        gc.set_threshold(*during)
        yield
    finally:
        if gc.get_threshold() == during:  # else an imported library has its own wishes
            _count_anew()
            gc.set_threshold(*before)


def _count_anew() -> None:
    """Make all objects long-lived, and the number of collections since the last full one zero."""
    if gc.get_freeze_count() or not gc.isenabled():
        return  # unfreezing would thaw what the user froze
    gc.collect(1)  # young garbage would otherwise become long-lived
    # One step of C calls both, so that no signal and no other thread comes between them.
    _ = tuple(map(operator.call, (gc.freeze, gc.unfreeze)))


@contextmanager
def no_collections() -> Iterator[None]:
    """Collect nothing, while code makes many objects and no garbage of size.

    Objects that live for a moment then never count as long-lived. Their number decides when Python scans all objects.
    """
    if not gc.isenabled():
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()


def forget_frames(error: BaseException, handled: BaseException | None = None) -> None:
    """Clear the local variables in the finished frames of ``error`` and its causes. Files and line numbers stay.

    Args:
        error: The raised error.
        handled: The error that was being handled before. Its frames are the caller's and keep their variables.
    """
    seen: set[int] = {id(handled)}
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            _forget(current.__traceback__)
            pending += [current.__cause__, current.__context__]
            pending += current.exceptions if isinstance(current, BaseExceptionGroup) else ()


def _forget(traceback: TracebackType | None) -> None:
    while traceback is not None:
        with suppress(RuntimeError):  # the frame still runs
            traceback.tb_frame.clear()
            # Before Python 3.13, reading f_locals leaves a copy of the variables in the frame. Another read empties it.
            _ = traceback.tb_frame.f_locals
        traceback = traceback.tb_next
