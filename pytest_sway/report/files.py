"""Functions that write or append the files of a run."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON and replace an existing file.

    Raises:
        OSError: The file cannot be written. An existing file is unchanged.
    """
    write_text(json.dumps(record, allow_nan=False, indent=1) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file and replace an existing one.

    Raises:
        OSError: The file cannot be written. An existing file is unchanged.
    """
    target = Path(os.path.realpath(path))
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        with suppress(OSError):
            unfinished.unlink()


def append_text(text: str, path: Path) -> None:
    """Append to a text file in one write, on a new line.

    Raises:
        OSError: The file cannot be written.
    """
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        start = "" if file.read(1) in (b"", b"\n") else "\n"
        file.write((start + text).encode("utf-8", "backslashreplace"))
