"""Reading files that come from anywhere: only regular ones, and never more than a bound."""

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
"""More than any config, whose size is in kilobytes; such a file is parsed in a fraction of a second."""

INDEX_BYTES: Final = 64 * 2**20
"""More than the index of any model's weights."""

TOKENIZER_BYTES: Final = 256 * 2**20
"""More than any vocabulary: the largest that are known take some 40 MB as JSON."""

_KINDS: Final = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)  # fmt: skip


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file for reading; anything else is refused, where a pipe would be waited for.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
            raise OSError(errno.EINVAL, f"it is {kind} and no regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path | str, limit: int) -> bytes:
    """Return what is in a regular file of at most ``limit`` bytes.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes, too many for what it should be", str(path))
    return content
