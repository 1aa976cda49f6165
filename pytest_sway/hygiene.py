"""Leaks and mutations: what is asked of a backend, and the sentences that name the culprit.

How a backend knows is its own affair; one that does not know is taken at its word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sway.errors import BackendClosedError
from pytest_sway.residency import format_bytes

if TYPE_CHECKING:
    from pytest_sway.spec import ModelSpec


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
        return list(ask())
    except BackendClosedError:
        return ["the backend was closed, which is the cache's to do"]


def leak(backend: Any) -> Leak | None:
    """What is still in memory of a backend that was closed."""
    ask = getattr(backend, "leak", None)
    found: Leak | None = ask() if callable(ask) else None
    return found


def mutation_message(test: str, changed: Iterable[tuple[ModelSpec, list[str]]]) -> str:
    """Say what a test left changed."""
    found = "\n".join(f"  {spec}:\n" + "\n".join(f"    {line}" for line in lines) for spec, lines in changed)
    return (
        f"{test} left a shared model changed:\n{found}\n"
        "  It was closed, so that the next test gets a clean one. Undo such changes, or work on a model of the"
        " test's own."
    )


def leak_message(spec: ModelSpec, found: Leak, users: Sequence[str]) -> str:
    """Say what outlived its backend, who holds it, and which tests used it."""
    holders = "\n".join(f"    held by {holder}" for holder in found.holders) or "    held by something unknown"
    used = f"\n    used by {', '.join(users)}" if users else ""
    return f"{format_bytes(found.nbytes)} of {spec} were still in memory after its close\n{holders}{used}"
