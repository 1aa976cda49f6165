"""Sizes and lists of names as a person reads them, in errors and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable


__tracebackhide__ = True

_LONGEST_NAME: Final = 150


def format_bytes(size: int) -> str:
    """``size`` for people, in binary units: ``1.5 GiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def some(names: Iterable[str], limit: int = 3) -> str:
    """Return the first of some names, for an error that has no room for all, or for one without end."""
    names = sorted(names)
    few = (name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in names[:limit])
    return ", ".join(few) + (", ..." if len(names) > limit else "")


def summarised(lines: list[str], limit: int = 10) -> list[str]:
    """Return at most ``limit`` lines, and how many more there are."""
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]


def shown(value: object, limit: int = 80) -> str:
    """Return the ``repr`` of what a file holds, cut to a length that fits into an error."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str | list) else value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
