"""`LoadProgress`: shows slow loads on the terminal, and notes all loads on disk in case the worker dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


class LoadProgress:
    """Shows slow loads on a terminal, and notes all loads in a file.

    Args:
        terminal: The terminal, bypassing pytest's capture; ``None`` to show nothing.
        worker: The name of the xdist worker, if several write to one terminal.
        note: A file that holds one line for each load in progress.
        patience: Seconds after which a load is shown.
    """

    def __init__(
        self,
        terminal: TextIO | None,
        *,
        worker: str | None = None,
        note: Path | None = None,
        patience: float = 2.0,
    ) -> None:
        self._terminal = terminal
        self._worker = worker
        self._note = note
        self._patience = patience
        self._running: list[str] = []
        self._lock = threading.Lock()

    @contextmanager
    def loading(self, what: str) -> Iterator[None]:
        """Watch one load for as long as the block lasts."""
        with self._noted(what), self._shown(what):
            yield

    @contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        self._running.append(what)
        self._write_note()
        try:
            yield
        finally:
            self._running.remove(what)
            self._write_note()

    def _write_note(self) -> None:
        if self._note is not None:
            with self._lock, suppress(OSError):  # a full disk must not fail a load
                self._note.write_text("\n".join(self._running), "utf-8", "backslashreplace")

    @contextmanager
    def _shown(self, what: str) -> Iterator[None]:
        if self._terminal is None:
            yield
            return
        announced = threading.Event()
        timer = threading.Timer(self._patience, self._announce, (what, announced))
        timer.daemon = True
        timer.start()
        started = time.perf_counter()
        try:
            yield
        finally:
            timer.cancel()
            if announced.is_set():
                seconds = f"{time.perf_counter() - started:.1f} s\n"
                self._write(seconds if self._worker is None else f"\n[{self._worker}] sway: loaded {what} in {seconds}")

    def _announce(self, what: str, announced: threading.Event) -> None:
        announced.set()
        if self._worker is None:
            self._write(f"\nsway: loading {what} ... ")
        else:  # whole lines, since several processes write to the terminal
            self._write(f"\n[{self._worker}] sway: loading {what} ...\n")

    def _write(self, text: str) -> None:
        if self._terminal is not None:
            with suppress(OSError, ValueError):  # a closed terminal must not fail a load
                self._terminal.write(text)
                self._terminal.flush()


def noted_loads(note: Path) -> tuple[str, ...]:
    """Return the loads that were in progress when a process last wrote its note."""
    try:
        return tuple(note.read_text("utf-8").splitlines())
    except OSError:
        return ()
