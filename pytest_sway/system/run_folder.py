"""A folder of one run in the temporary directory, for what its processes share on this machine.

It goes when the run ends. What a run leaves that was killed, the next run removes: a lock that the system lets go with
its process tells which are left. That lock is not filelock's: here it is taken under one name and then
renamed, so that no folder ever stands there with a lock that nobody holds, which another run would remove.
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
except ImportError:  # Windows: nothing is locked, and nothing of others is removed
    fcntl = None  # type: ignore[assignment]

_PREFIX: Final = "pytest-sway-"
_ALIVE: Final = "alive"
_DEADLY: Final = ("SIGTERM", "SIGHUP")


class RunFolder:
    """A new folder that only this user can read.

    A signal that ends the process removes it first, unless somebody else handles that signal.

    Attributes:
        path: Where it is.

    Raises:
        OSError: None can be made.
    """

    def __init__(self) -> None:
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        new = self.path / f"{_ALIVE}.new"
        self._lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                new.rename(self.path / _ALIVE)  # only now: who sees it under this name sees it locked
        self._process = os.getpid()
        self._handled = list(self._handle_signals())

    def remove(self) -> None:
        """Remove the folder and all that is in it; what processes have mapped stays theirs."""
        for number in self._handled:
            if signal.getsignal(number) == self._die and threading.current_thread() is threading.main_thread():
                signal.signal(number, signal.SIG_DFL)
        gone = self.path.with_name(f"{self.path.name}.gone")
        with suppress(OSError):
            self.path.rename(gone)  # at once, so that no worker writes on while it is emptied
        for folder in (self.path, gone):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            os.close(self._lock)

    def _handle_signals(self) -> Iterator[int]:
        """Stand before the deadly signals that nobody else handles; handlers that come later take this one's place."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in _DEADLY:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self._die)
                yield number

    def _die(self, number: int, _frame: object) -> None:
        if os.getpid() == self._process:  # a forked child has the handler, and not the folder
            self.remove()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _remove_abandoned(directory: Path) -> None:
    """Remove the folders of runs that are no more."""
    if fcntl is None:
        return
    for folder in directory.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, another program's, or gone by now
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            lock = os.open(folder / _ALIVE, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
