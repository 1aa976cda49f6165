"""What callers get of the cache: a backend with what is known of it, and a lease that pins it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from types import TracebackType

    from pytest_sway.cache.entries import Claim, Entry
    from pytest_sway.cache.ledger import Ledger
    from pytest_sway.spec.model_spec import Key, ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


@dataclass(frozen=True, slots=True)
class CachedBackend:
    """A backend in the cache.

    Attributes:
        key: Its identity, `pytest_sway.spec.model_spec.cache_key_for`.
        backend: What the build returned.
        model_spec: The spec it was loaded from, with device and dtype resolved.
        load_seconds: How long the load took, its base included where that was loaded too, and the import of libraries
            not.
    """

    key: Key
    backend: Any
    model_spec: ModelSpec
    load_seconds: float


@final
class Lease:
    """A claim on an entry, which is not evicted before `release`; also a context manager that gives the backend.

    A lease that is dropped without a release counts as released once it is collected.

    Attributes:
        cached: What is leased.
    """

    __slots__ = ("__weakref__", "_claim", "_entry", "_ledger", "cached")

    def __init__(self, ledger: Ledger, entry: Entry, claim: Claim, cached: CachedBackend) -> None:
        self._ledger = ledger
        self._entry = entry
        self.cached = cached
        self._claim = claim  # last: a lease that an interrupt left half made has none

    @property
    def backend(self) -> Any:
        """The leased backend."""
        return self.cached.backend

    def release(self) -> None:
        """Give the claim up. Again, or from another thread, is harmless."""
        self._ledger.release(self._entry, self._claim)

    def __enter__(self) -> Any:
        return self.backend

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        # A collection can come at any moment, also under the lock: so only leave a note, for the next step to read.
        if hasattr(self, "_claim") and self._claim in self._entry.claims:
            self._ledger.dropped.append((self._entry, self._claim))
