"""Tell the paths of models from hub ids, and resolve them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from pytest_sway.errors import SpecError

__tracebackhide__ = True

GGUF_SUFFIX: Final = ".gguf"
_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_path(base: str) -> bool:
    """Whether a base is written as a folder or a GGUF file, not as a hub id such as ``org/name``."""
    return (
        base.startswith(("/", "~", "."))
        or base.endswith(GGUF_SUFFIX)
        or os.path.isabs(base)
        or not _HUB_ID.fullmatch(base)
    )


def resolved_model(path: str | os.PathLike[str]) -> Path:
    """Return the path of a model's folder or file.

    A link to a GGUF file is not followed: in a hub's cache, the name that it leads to lacks the suffix.
    """
    path = Path(path)
    return resolved_path(path.parent) / path.name if path.suffix == GGUF_SUFFIX else resolved_path(path)


def resolved_path(path: str | os.PathLike[str]) -> Path:
    """Return a path without ``~``, links and ``..``.

    Raises:
        SpecError: The path cannot be resolved.
    """
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, ValueError, OSError) as error:  # an unknown user's ~, a null byte, a loop of links
        raise SpecError(f"the path {os.fspath(path)!r} cannot be resolved: {str(error).rstrip('.')}.") from error


def short_name(text: str) -> str:
    """Return the last two parts of a path or hub id, as a short label."""
    return "/".join(text.rstrip(os.sep).split(os.sep)[-2:]).lstrip("/")
