"""What files hold, in the length that an error has room for."""

from __future__ import annotations

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


def shown(value: object, limit: int = 80) -> str:
    """Return the ``repr`` of what a file holds, cut to a length that fits into an error."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str | list) else value)
    except RecursionError:
        text = f"a {type(value).__name__} of many levels"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
