"""Letting go of what finished frames hold: the local variables of a failed test or load refer to models."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__tracebackhide__ = True


def forget_frames(error: BaseException, handled: BaseException | None = None) -> None:
    """Drop the local variables of the finished frames of ``error`` and of its causes; files and line numbers stay.

    Args:
        error: What was raised.
        handled: What was being handled before; its frames are the caller's, and keep their variables.
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
        with suppress(RuntimeError):  # a frame that still runs
            traceback.tb_frame.clear()
            # Before Python 3.13, whoever has read f_locals has left a copy in the frame. Reading it again empties it.
            _ = traceback.tb_frame.f_locals
        traceback = traceback.tb_next
