"""Leaks and mutations: how a backend is asked for them, and the messages that name the culprit.

A backend that has no ``changes()`` or ``leak()`` counts as unchanged and as released.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sway.errors import BackendClosedError
from pytest_sway.system.redaction import redacted
from pytest_sway.system.wording import format_bytes

if TYPE_CHECKING:
    from pytest_sway.spec.model_spec import ModelSpec


class Leak(Protocol):
    """Weights that are still in memory after their backend was closed."""

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""
        ...

    @property
    def holders(self) -> Sequence[str]:
        """The chains of references that hold them, outermost first."""
        ...


def changes(backend: Any) -> list[str]:
    """Return one line for each change of ``backend`` since its load."""
    ask = getattr(backend, "changes", None)
    if not callable(ask):
        return []
    try:
        return [redacted(str(line)) for line in ask()]
    except BackendClosedError:
        return ["the backend was closed, which only the cache may do"]
    except Exception as error:
        return [f"comparing it with its state after the load failed: {type(error).__name__}: {redacted(str(error))}"]


def leak(backend: Any) -> Leak | None:
    """Return the weights of a closed backend that are still in memory, if any."""
    ask = getattr(backend, "leak", None)
    found: Leak | None = ask() if callable(ask) else None
    nbytes = getattr(found, "nbytes", None)
    return found if isinstance(nbytes, int) and nbytes > 0 else None  # a mock has every attribute, but no number


def mutation_message(test: str, changed: Iterable[tuple[ModelSpec, list[str]]]) -> str:
    """Return the message about models that a test left changed."""
    found = "\n".join(f"  {spec}:\n" + "\n".join(f"    {line}" for line in lines) for spec, lines in changed)
    return (
        f"{test} left a shared model changed:\n{found}\n"
        "  It is closed once no wider fixture holds it, and the next test loads a clean one. Undo the change in the"
        " test, or change a copy."
    )


def spoilt_message(fixture: str, spec: ModelSpec, culprit: str) -> str:
    """Return the message about a fixture whose backend an earlier test left changed."""
    return (
        f"the fixture {fixture!r} holds {spec}, which {culprit} left changed, so this test would measure a changed"
        " model. Fix that test, or give the fixture a narrower scope."
    )


def leak_message(spec: ModelSpec, found: Leak, users: Sequence[str]) -> str:
    """Return the message about leaked weights: their size, who holds them, and the tests that used them last."""
    holders = "\n".join(f"    held by {holder}" for holder in found.holders) or "    held by something unknown"
    used = f"\n    last used by {', '.join(users)}" if users else ""
    return f"{format_bytes(found.nbytes)} of {spec} were still in memory after its close\n{holders}{used}"
