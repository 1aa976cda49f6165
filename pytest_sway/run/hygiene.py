"""Leaks and mutations: what is asked of a backend, and the sentences that name the culprit.

How a backend knows is its own affair; one that does not know is taken at its word.
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
        """By what chains of references they are held, outermost first."""
        ...


def changes(backend: Any) -> list[str]:
    """One line for each thing about ``backend`` that is not as it was after its load."""
    ask = getattr(backend, "changes", None)
    if not callable(ask):
        return []
    try:
        return [redacted(str(line)) for line in ask()]
    except BackendClosedError:
        return ["the backend was closed, which is the cache's to do"]
    except Exception as error:
        return [f"it cannot be compared with what it was: {type(error).__name__}: {redacted(str(error))}"]


def leak(backend: Any) -> Leak | None:
    """What is still in memory of a backend that was closed."""
    ask = getattr(backend, "leak", None)
    found: Leak | None = ask() if callable(ask) else None
    nbytes = getattr(found, "nbytes", None)
    return found if isinstance(nbytes, int) and nbytes > 0 else None  # a mock answers everything, with no number


def mutation_message(test: str, changed: Iterable[tuple[ModelSpec, list[str]]]) -> str:
    """Say what a test left changed."""
    found = "\n".join(f"  {spec}:\n" + "\n".join(f"    {line}" for line in lines) for spec, lines in changed)
    return (
        f"{test} left a shared model changed:\n{found}\n"
        "  It is closed, once no wider fixture holds it, and the next test that asks gets a clean one. Undo such"
        " changes in the test, or work on a model of its own."
    )


def spoilt_message(fixture: str, spec: ModelSpec, culprit: str) -> str:
    """Say that a fixture's backend is no longer what its spec names."""
    return (
        f"the fixture {fixture!r} holds {spec}, which {culprit} left changed; what this test would measure is not what"
        " the spec names. Mend that test, or give the fixture a narrower scope."
    )


def leak_message(spec: ModelSpec, found: Leak, users: Sequence[str]) -> str:
    """Say what outlived its backend, who holds it, and which tests used it."""
    holders = "\n".join(f"    held by {holder}" for holder in found.holders) or "    held by something unknown"
    used = f"\n    last used by {', '.join(users)}" if users else ""
    return f"{format_bytes(found.nbytes)} of {spec} were still in memory after its close\n{holders}{used}"
