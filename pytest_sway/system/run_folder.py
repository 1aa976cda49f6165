"""A folder in the temporary directory that the processes of one run share on this machine.

It is removed when the run ends. If a run was killed, the next run removes its folder: the system has released the lock
of the ended process. filelock can't serve here: this lock is taken under one name and then renamed, so that no other
run ever finds an unlocked one and removes the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

try:
    import fcntl
except ImportError:  # Windows: no locks, so the folders of other runs stay
    fcntl = None  # type: ignore[assignment]

_PREFIX: Final = "pytest-sway-"
_ALIVE: Final = "alive"
_DEADLY: Final = ("SIGTERM", "SIGHUP")


class RunFolder:
    """A new folder that only this user can read.

    A signal that ends the process removes it first, unless that signal has another handler.

    Attributes:
        path: Its path.

    Raises:
        OSError: The folder cannot be made.
    """

    def __init__(self) -> None:
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        new = self.path / f"{_ALIVE}.new"
        lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        self._lock: int | None = lock
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
                new.rename(self.path / _ALIVE)  # under this name it is always locked
        self._process = os.getpid()
        self._handled = list(self._handle_signals())

    def remove(self) -> None:
        """Remove the folder with its files; processes keep what they have mapped."""
        for number in self._handled:
            if signal.getsignal(number) == self._die and threading.current_thread() is threading.main_thread():
                signal.signal(number, signal.SIG_DFL)
        gone = self.path.with_name(f"{self.path.name}.gone")
        if fcntl is None:
            self._unlock()  # Windows neither renames nor removes a folder with an open file
        with suppress(OSError):
            self.path.rename(gone)  # first, so that no worker writes into it meanwhile
        for folder in (self.path, gone):
            shutil.rmtree(folder, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):
                os.close(lock)

    def _handle_signals(self) -> Iterator[int]:
        """Handle the deadly signals that have no handler yet. Later handlers replace this one."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in _DEADLY:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self._die)
                yield number

    def _die(self, number: int, _frame: object) -> None:
        if os.getpid() == self._process:  # a forked child inherits the handler, but not the folder
            self.remove()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _remove_abandoned(directory: Path) -> None:
    """Remove the folders that killed runs have left."""
    if fcntl is None:
        return
    for folder in directory.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, another program's, in use, or gone
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            lock = os.open(folder / _ALIVE, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
