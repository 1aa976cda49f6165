"""Tell the paths of models from hub ids, and resolve them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from pytest_sway.errors import SpecError

__tracebackhide__ = True

GGUF_SUFFIX: Final = ".gguf"
_HUB_ID: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SNAPSHOT: Final = re.compile(r"(?:.*[/\\])?models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]([^/\\]+)(?:[/\\]+(.*))?")


def begins_as_path(text: str) -> bool:
    """Whether a text begins as a path, so that it is nothing else, such as a hub id or a name."""
    return text.startswith(("/", "~", ".")) or os.path.isabs(text)


def is_path(base: str) -> bool:
    """Whether a base is written as a folder or a GGUF file, not as a hub id such as ``org/name``."""
    return begins_as_path(base) or base.endswith(GGUF_SUFFIX) or not _HUB_ID.fullmatch(base)


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
    if "\0" in str(path):  # each version of Python says it in other words
        raise SpecError(f"the path {os.fspath(path)!r} cannot be resolved: it holds a null character.")
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, ValueError, OSError) as error:  # an unknown user's ~, half a surrogate pair, a loop of links
        raise SpecError(f"the path {os.fspath(path)!r} cannot be resolved: {str(error).rstrip('.')}.") from error


class InHubCache(NamedTuple):
    """A place in a hub's cache.

    Attributes:
        repository: The id of the repository, ``org/name``.
        commit: The commit.
        inside: The path in the repository; empty for its root.
    """

    repository: str
    commit: str
    inside: str

    @property
    def name(self) -> str:
        """The repository and the path in it, without the commit."""
        return "/".join(filter(None, (self.repository, self.inside)))

    def __str__(self) -> str:
        return "/".join(filter(None, (f"{self.repository}@{self.commit[:7]}", self.inside)))


def in_hub_cache(path: str) -> InHubCache | None:
    """Return of which repository's snapshot a path is, on this machine or another; ``None`` if it is of none."""
    found = _SNAPSHOT.fullmatch(path) if "models--" in path else None
    if found is None:
        return None
    return InHubCache(f"{found[1]}/{found[2]}", found[3], (found[4] or "").rstrip("/\\"))


def short_name(text: str) -> str:
    """Return the last two parts of a path or hub id, or a snapshot's repository, as a short label."""
    cached = in_hub_cache(text)
    if cached is not None:
        return str(cached)
    return "/".join(text.rstrip(os.sep).split(os.sep)[-2:]).lstrip("/")
