"""Read files of any origin: only regular ones, and only up to a limit."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from io import BufferedReader
    from pathlib import Path

__tracebackhide__ = True

CONFIG_BYTES: Final = 4 * 2**20
"""The limit for a config. Real ones take kilobytes, and 4 MiB are parsed in a fraction of a second."""

INDEX_BYTES: Final = 64 * 2**20
"""The limit for the index of a model's weights."""

TOKENIZER_BYTES: Final = 256 * 2**20
"""The limit for a tokenizer's file; the largest known ones take some 40 MB as JSON."""

_KINDS: Final = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)  # fmt: skip


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file for reading. Refuse anything else: opening a pipe, for example, would wait for a writer.

    Raises:
        OSError: The file cannot be opened, or is not a regular one.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path | str, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: The file cannot be read, is not a regular one, or is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes, too many for a file of its kind", str(path))
    return content
