"""The check before a suite of probes: whether both sides answer with finite numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from pytest_sway.protocols import TokenDist, View

_PROMPT: Final = "hello"
_TOP_K: Final = 8


def preflight(sides: Mapping[str, Callable[[], AbstractContextManager[View]]]) -> tuple[bool, str]:
    """Score one prompt on each side.

    Args:
        sides: What opens a view on each, by the name that a report knows it by.

    Returns:
        ``(True, "")``, or ``(False, reason)``.
    """
    reasons = []
    for label, opened in sides.items():
        try:
            with opened() as view:
                reasons.append(not_finite(label, view.next_token_dist(_PROMPT, top_k=_TOP_K)))
        except Exception as error:  # the check reports whatever went wrong
            reasons.append(f"the {label} view raised {type(error).__name__}: {redacted(str(error))}")
    return not any(reasons), "; ".join(filter(None, reasons))


def not_finite(label: str, dist: TokenDist) -> str:
    """Return what is not finite in a view's distribution, in words; nothing if all is."""
    bad = sum(not math.isfinite(logprob) for logprob in dist.logprobs)
    if bad:
        return f"the {label} view gave {bad} of {dist.logprobs.size} non-finite log-probabilities"
    if dist.tail_logprob is not None and not math.isfinite(dist.tail_logprob):
        return f"the {label} view gave a non-finite tail_logprob, {dist.tail_logprob}"
    return ""
