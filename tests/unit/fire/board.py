"""The status of several threads, running, waiting in the cache or at a gate, so that a test chooses each interleaving.

After each command the test waits until no thread runs. Then it may open one gate.
"""

from __future__ import annotations

import enum
import faulthandler
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.system.locking import OneShotEvent
from tests.unit.fakes import DEADLINE


class Status(enum.Enum):
    IDLE = "idle"
    RUNNING = "running"
    WAITING = "waiting in the cache"
    AT_GATE = "at a gate"


class Board:
    """The statuses of the workers, and their gates."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.status: dict[threading.Thread, Status] = {}
        self.gates: dict[threading.Thread, str] = {}
        self.all_open = False

    def note(self, status: Status) -> None:
        with self.changed:
            self.status[threading.current_thread()] = status
            self.changed.notify_all()

    def pass_gate(self, name: str) -> None:
        """Stop the calling worker until its gate is opened."""
        me = threading.current_thread()
        with self.changed:
            if self.all_open or me not in self.status:
                return
            self.gates[me] = name
            self.status[me] = Status.AT_GATE
            self.changed.notify_all()
            passed = self.changed.wait_for(lambda: self.all_open or me not in self.gates, DEADLINE)
            self.gates.pop(me, None)
            self.status[me] = Status.RUNNING
        assert passed, f"nobody opened the gate of {name}"

    def open_gate(self, number: int) -> None:
        """Open a gate at which a worker waits."""
        with self.changed:
            if self.gates:
                me = list(self.gates)[number % len(self.gates)]
                del self.gates[me]
                self.status[me] = Status.RUNNING
                self.changed.notify_all()

    def open_all(self) -> None:
        with self.changed:
            self.all_open = True
            for me in self.gates:
                self.status[me] = Status.RUNNING
            self.gates.clear()
            self.changed.notify_all()

    def settle(self) -> None:
        """Wait until no worker runs."""
        with self.changed:
            quiet = self.changed.wait_for(lambda: Status.RUNNING not in self.status.values(), DEADLINE)
        if not quiet:
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
            raise AssertionError(f"somebody still runs: {self.status}")

    def count(self, status: Status) -> int:
        with self.changed:
            return list(self.status.values()).count(status)


def note_waits(cache: BackendCache, board: Board) -> None:
    """Record which workers wait in the cache; a woken worker counts as running at once."""
    usual_wait, usual_announce = cache._wait, cache._ledger._announce
    rung: weakref.WeakSet[OneShotEvent] = weakref.WeakSet()

    def wait(event: OneShotEvent, timeout: float) -> None:
        with board.changed:
            if event not in rung:
                board.note(Status.WAITING)
        try:
            usual_wait(event, timeout)
        finally:
            board.note(Status.RUNNING)

    def announce() -> None:
        with board.changed:
            if cache._ledger._changed is not None:
                rung.add(cache._ledger._changed)
            for thread, status in board.status.items():
                if status is Status.WAITING:
                    board.status[thread] = Status.RUNNING
            usual_announce()

    cache._wait, cache._ledger._announce = wait, announce  # type: ignore[method-assign]


class Worker:
    """A thread that runs one command after the other."""

    def __init__(self, board: Board, name: str) -> None:
        self._board = board
        self._commands: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        board.status[self.thread] = Status.IDLE
        self.thread.start()

    @property
    def idle(self) -> bool:
        return self._board.status[self.thread] is Status.IDLE

    def do(self, command: Callable[[], Any]) -> None:
        with self._board.changed:
            self._board.status[self.thread] = Status.RUNNING
        self._commands.put(command)

    def stop(self) -> None:
        self._commands.put(None)
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive(), f"{self.thread.name} did not end"

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            try:
                command()
            except BaseException as error:
                self.errors.append(error.with_traceback(None))
            self._board.note(Status.IDLE)
