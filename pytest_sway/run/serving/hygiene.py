"""`Hygiene`: finds changed models after each test, and weights that stay in memory; its messages name the culprit.

A backend that has no ``changes()`` or ``leak()`` counts as unchanged and as released.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sway.errors import BackendClosedError, MutationError, SwayWarning, ends_run
from pytest_sway.system.redaction import redacted
from pytest_sway.system.wording import format_bytes

if TYPE_CHECKING:
    from pytest_sway.cache.backend_cache import BackendCache
    from pytest_sway.cache.entries import CachedBackend
    from pytest_sway.cache.owners import Owner
    from pytest_sway.run.settings import SwaySettings
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


class Hygiene:
    """The checks of one run.

    Args:
        cache: The cache of the backends.
        settings: The settings of the run.
    """

    def __init__(self, cache: BackendCache, settings: SwaySettings) -> None:
        self._cache = cache
        self._settings = settings
        self._touched: list[CachedBackend] = []
        self._held: list[CachedBackend] = []
        self._spoilt: list[tuple[CachedBackend, str]] = []
        self._users: dict[int, deque[str]] = {}

    def leased(self, cached: CachedBackend, user: str) -> None:
        """Note that a test or fixture uses a backend."""
        self._touched.append(cached)
        users = self._users.setdefault(id(cached), deque(maxlen=3))
        if user not in users:
            users.append(user)

    def end_test(self, test: str) -> MutationError | None:
        """Compare the backends leased during a test with their loaded state, and retire changed ones.

        This includes those of wider fixtures, which may change a model in their own teardown.

        Returns:
            The error for the test, if it left changes and they are errors.
        """
        touched, self._touched = self._touched, []
        if self._settings.on_mutation == "ignore":
            return None
        held, self._held = self._held, self._cache.leased()
        used = {id(cached) for cached in (*touched, *held, *self._held)}
        ready = self._cache.ready()  # without retired backends, whose changes were reported before
        mine = [cached for cached in ready if id(cached) in used]
        try:
            changed = [(cached, lines) for cached in mine if (lines := changes(cached.backend))]
        except BaseException:  # a timeout's, so it is not known whether they have changed
            for cached in mine:
                self._cache.retire(cached)
            raise
        if not changed:
            return None
        for cached in ready:  # backends that share a changed base are changed too, by this test
            if changes(cached.backend):
                self._spoilt.append((cached, test))
                self._cache.retire(cached)
        message = mutation_message(test, [(cached.model_spec, lines) for cached, lines in changed])
        self._cache.stats.mutations.append(message)
        if self._settings.on_mutation == "warn":
            warnings.warn(message, SwayWarning, stacklevel=3)
            return None
        return MutationError(message)

    def check_fixtures(self, fixtures: Callable[[], Mapping[Owner, str]], told: set[str]) -> None:
        """Refuse a test whose fixtures hold a backend that an earlier test changed.

        Args:
            fixtures: Returns the names of the test's wider fixtures, by the owners of the leases of their set-up.
            told: The messages that the test had before, which are not repeated; new ones are added.

        Raises:
            MutationError: One of them has a lease on such a backend, and changes are errors.
        """
        for cached, culprit in self._spoilt:
            names = fixtures()
            held = [names[owner] for owner in self._cache.owners_of(cached) if owner in names]
            if not held:
                continue
            message = spoilt_message(min(held), cached.model_spec, culprit)
            if message in told:
                continue
            told.add(message)
            if self._settings.on_mutation == "error":
                raise MutationError(message)
            warnings.warn(message, SwayWarning, stacklevel=2)

    def closed(self, cached: CachedBackend) -> None:
        """Look for weights of a closed backend that are still in memory."""
        users = tuple(self._users.pop(id(cached), ()))
        if self._settings.on_leak != "ignore" and (found := leak(cached.backend)) is not None:
            self._cache.stats.leaks.append(leak_message(cached.model_spec, found, users))


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
        if ends_run(error):
            raise
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
