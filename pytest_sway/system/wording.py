"""Format sizes, names and values for errors and reports."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable


__tracebackhide__ = True

_LONGEST_NAME: Final = 150
_CONTROL: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, half characters, and of what ends a line or a paragraph."""


def format_bytes(size: int) -> str:
    """Return ``size`` in binary units, such as ``1.5 GiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def some(names: Iterable[str], limit: int = 3) -> str:
    """Return the first ``limit`` names in order, each cut to 150 characters, as a text for an error."""
    names = sorted(names)
    few = (name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in names[:limit])
    return ", ".join(few) + (", ..." if len(names) > limit else "")


def natural(text: str) -> list[tuple[int, str]]:
    """Return what a text is sorted by, so that ``checkpoint-8`` comes before ``checkpoint-16``."""
    parts = re.split(r"([0-9]+)", text)
    return [(len(part.lstrip("0")) if at % 2 else 0, part) for at, part in enumerate(parts)]


def summarised(lines: list[str], limit: int = 10) -> list[str]:
    """Return at most ``limit`` lines, and one with the number of the others."""
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]


def visible(text: str) -> str:
    """Return ``text`` with its control characters as Python writes them: a terminal would obey them."""
    return "".join(repr(char)[1:-1] if unicodedata.category(char) in _CONTROL else char for char in text)


def shown(value: object, limit: int = 80) -> str:
    """Return a value's ``repr``, cut to ``limit`` characters."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str | list) else value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
