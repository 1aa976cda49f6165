"""The folder for what later runs can use again, and small files in it.

Nothing in it is needed: a file that cannot be read or written only costs time.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from pytest_sway.system.reading import read_bounded


def user_cache() -> Path | None:
    """Return the folder of pytest-sway in the user's cache; ``None`` if the user has no home folder."""
    try:
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if xdg.is_absolute():  # its specification has others ignored
            caches = xdg
        elif sys.platform == "darwin":
            caches = Path.home() / "Library" / "Caches"
        elif local := os.environ.get("LOCALAPPDATA"):
            caches = Path(local)
        else:
            caches = Path.home() / ".cache"
    except RuntimeError:
        return None
    return caches / "pytest-sway"


def read_small(path: Path, limit: int) -> bytes | None:
    """Return the content of a file of at most ``limit`` bytes and note that it was used; ``None`` if that fails."""
    try:
        content = read_bounded(path, limit)
    except OSError:
        return None
    with suppress(OSError):  # the folder may be read-only
        os.utime(path)
    return content


def write_small(path: Path, content: bytes, most: int) -> None:
    """Write a file in one step, so that no process reads half of it, and keep only the last used files of its folder.

    Args:
        path: The file.
        content: Its content.
        most: The most files that stay in the folder.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise
        _drop_oldest(path.parent, most)


def _drop_oldest(folder: Path, most: int) -> None:
    files = list(folder.iterdir())
    if len(files) <= most:
        return
    used = {}
    for file in files:
        with suppress(OSError):  # another process has just dropped it
            used[file] = file.stat().st_mtime
    for file in sorted(used, key=lambda file: used[file])[: len(used) - most]:
        with suppress(OSError):
            file.unlink()
