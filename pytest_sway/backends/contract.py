"""What every backend owes: two views, a ``close()``, finite numbers; and what builds those that share their bases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from pytest_sway.errors import BackendLoadError
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Hashable

    from pytest_sway.protocols import DifferentialBackend, TokenDist, View


_PROMPT: Final = "hello"
_TOP_K: Final = 8


__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


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


def closers_of(built: Iterable[Any]) -> list[Callable[[], object]]:
    """The ``close`` methods of what was built; what has none is merely dropped."""
    closes = (getattr(backend, "close", None) for backend in built)
    return [close for close in closes if callable(close)]


def require_differential(backend: Any, made_by: str) -> DifferentialBackend:
    """Return ``backend``, if it has what a differential backend needs; close it otherwise.

    Args:
        backend: What somebody else's code made.
        made_by: Whose, for the message.

    Raises:
        BackendLoadError: It lacks a method.
    """
    missing = [name for name in ("as_base", "as_finetuned") if not callable(getattr(backend, name, None))]
    if missing:
        with suppress(Exception):  # the error to tell of is the one below
            for close in closers_of([backend]):
                close()
        raise BackendLoadError(
            f"{made_by} made a {type(backend).__name__}, which is no differential backend: it lacks"
            f" {' and '.join(missing)}."
        )
    checked: DifferentialBackend = backend
    return checked


class PooledBuilder(Protocol):
    """Builds backends of one kind, which share what is loaded for them; see `Builder` for what each does."""

    def build(self, spec: ModelSpec) -> DifferentialBackend:
        """Load what a spec asks for and is not loaded yet."""
        ...

    def check(self, spec: ModelSpec) -> Any:
        """Find what can be found wrong with a spec without loading it."""
        ...

    def estimate(self, spec: ModelSpec) -> Mapping[Hashable, int] | None:
        """Return the bytes that each part of a spec will take."""
        ...

    def hold(self, spec: ModelSpec) -> AbstractContextManager[None]:
        """Keep what a spec shares with others from being closed."""
        ...
