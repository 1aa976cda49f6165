"""An event loop in a thread of its own, so that any thread can wait for requests or end them.

anyio's portal is not used: a forked child that drops one waits forever for a thread that it does not have. It is no
faster either: 0.18 ms to start and 0.11 ms for a call, against 0.11 and 0.06 ms here.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_sway.system.locking import call_in_forked_child

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

T = TypeVar("T")

__tracebackhide__ = True


class LoopClosedError(Exception):
    """The loop was closed before or during the work."""


class EventLoopThread:
    """An event loop in a thread of its own, which ends with `close`.

    Args:
        name: The thread's name.
    """

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._forked = False
        self._last: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._error: BaseException | None = None
        self._ends = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()
        call_in_forked_child(self._forget)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` in the loop and return its result. An interrupt of the waiting thread cancels it.

        Raises:
            LoopClosedError: The loop is closed, or was closed meanwhile.
        """
        with self._lock:  # `close` cancels all that began before it
            if self._closed:
                work.close()
                raise LoopClosedError
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            error = future.exception()
        except CancelledError:
            raise LoopClosedError from None
        except BaseException:  # an interrupt of this thread
            future.cancel()
            raise
        if error is not None:
            raise error  # not by result(), whose frames a failing test would show
        return future.result()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Cancel all running work, run what ``last`` returns, and end the thread. Closing twice is harmless.

        After an interrupt of the waiting thread, the loop's thread still does all of that.
        """
        with self._lock:
            self._closed = True
            self._last = self._last or last
        if self._forked:
            return
        with suppress(RuntimeError):  # the loop has closed meanwhile
            self._loop.call_soon_threadsafe(self._ends.set)
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._until_closed())
        except BaseException as error:  # `close` raises it
            self._error = error
        finally:
            with self._lock:
                self._closed = True
            self._loop.close()

    async def _until_closed(self) -> None:
        await self._ends.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        try:
            if self._last is not None:
                await self._last()
        finally:
            await self._loop.shutdown_default_executor()  # its thread looked up servers' names

    def _forget(self) -> None:
        """Mark it as closed in a forked child, which has no such thread and must not touch its parent's loop."""
        self._forked = True
        self._lock = threading.Lock()
        self._closed = True


async def in_order(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all of ``work`` concurrently and return the results in order. The first error cancels the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__  # not from the group, or a report would show all of its members
    return [task.result() for task in tasks]
