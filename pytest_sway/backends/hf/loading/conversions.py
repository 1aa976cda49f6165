"""Why transformers could not convert the weights of a base, which it tells only in its log."""

from __future__ import annotations

import re
import traceback
from typing import Final

__tracebackhide__ = True

_RAISED: Final = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception)\b.*$", re.MULTILINE)
"""Matches the last line of a traceback."""


def told(error: Exception) -> Exception:
    """Return an error with what transformers has collected while it converted weights; ``error`` if that is nothing.

    Args:
        error: What ``from_pretrained`` raised.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
        if isinstance(found, dict) and found:
            name, report = next(iter(found.items()))
            raised = _RAISED.findall(str(report))
            return RuntimeError(f"{name} cannot be converted: {raised[-1] if raised else report}")
    return error
