"""Clear the local variables of finished frames: those of a failed test or load keep models alive."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__tracebackhide__ = True


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
