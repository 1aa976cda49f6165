"""What the cache holds, as records: an entry, who claims it, and what callers get. No locks, no loading."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, final

from pytest_sway.cache.owners import Owner

if TYPE_CHECKING:
    from collections import deque
    from types import TracebackType

    from pytest_sway.spec.identity import Key
    from pytest_sway.spec.model_spec import ModelSpec


SizeByPart: TypeAlias = Mapping[Hashable, int]
"""Bytes by part; backends that share a part, such as a base, name it by the same key."""


__tracebackhide__ = True


class State(enum.Enum):
    """Where an entry stands; it only ever goes downwards."""

    QUEUED = "waiting for room"
    LOADING = "loading"
    READY = "ready"
    CLOSING = "closing"
    GONE = "gone"


RESIDENT: Final = frozenset({State.LOADING, State.READY, State.CLOSING})


@dataclass(slots=True, eq=False)
class Claim:
    """One lease, as its entry knows it.

    Attributes:
        holder: Who holds it, by name.
        owner: With what it ends at the latest.
        thread: Which thread asked.
    """

    holder: str
    owner: Owner
    thread: threading.Thread

    @property
    def orphaned(self) -> bool:
        """Whether the thread that asked has ended without a release."""
        return not self.owner.keeps and not self.thread.is_alive()

    def ends_without(self, asker: Operation) -> bool:
        """Whether it can end while this one waits; what a thread leaves behind is the main thread's to release."""
        if self.owner.keeps and self.holder == asker.holder:
            return False
        return asker.thread is not (threading.main_thread() if self.orphaned else self.thread)


@dataclass(slots=True, eq=False)
class Operation:
    """What one call has taken from the cache, so that it can be given back whatever happens.

    Attributes:
        holder: Who is named to others when the cache is full.
        owner: With what a lease ends that this call takes.
        thread: The calling thread, as an object: the number of one that ended is given to the next.
        entry: The entry that this call loads.
        built: The backend, between its build and its admission.
        victims: Entries that this call has set to CLOSING.
        waits_for: The entry whose load this call waits for.
        lease: Granted by the thread that loaded what this call waited for.
        error: The failure of the load that this call waited for.
    """

    holder: str
    owner: Owner = field(default_factory=lambda: Owner("nobody"))
    thread: threading.Thread = field(default_factory=threading.current_thread)
    entry: Entry | None = None
    built: list[Any] = field(default_factory=list)
    victims: list[Entry] = field(default_factory=list)
    waits_for: Entry | None = None
    lease: Lease | None = None
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class Entry:
    """One generation of one key, from the request that asked first until it is gone.

    Attributes:
        key: Its identity.
        spec: What it is loaded from, resolved.
        leader: The operation that loads it, until it is READY.
        state: Where it stands.
        cached: What callers get, once it is READY.
        parts: Its bytes: estimated while LOADING, measured when READY; ``None`` where unknown.
        claims: Its leases.
        waiters: The operations that wait for its load.
        closers: Its ``close()``, until that was called.
        closing_thread: Who closes it, once it is CLOSING.
    """

    key: Key
    spec: ModelSpec
    leader: Operation | None
    state: State = State.QUEUED
    cached: CachedBackend | None = None
    parts: SizeByPart | None = None
    claims: set[Claim] = field(default_factory=set)
    waiters: list[Operation] = field(default_factory=list)
    closers: list[Callable[[], object]] = field(default_factory=list)
    closing_thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether it may be evicted."""
        return self.state is State.READY and not self.claims

    def ends_without(self, asker: Operation) -> bool:
        """Whether it can become idle or gone while this one waits."""
        if self.state is State.READY:
            return all(claim.ends_without(asker) for claim in self.claims)
        worker = self.closing_thread if self.state is State.CLOSING else self.leader and self.leader.thread
        return worker is not asker.thread

    @property
    def occupation(self) -> str:
        """What keeps it from being evicted, for people."""
        if self.state is State.READY and self.claims:
            return "held by " + ", ".join(sorted({claim.holder for claim in self.claims}))
        return self.state.value


@dataclass(frozen=True, slots=True)
class CachedBackend:
    """A backend in the cache.

    Attributes:
        key: Its identity, `pytest_sway.backends.registry.cache_key_for`.
        backend: What the build returned.
        model_spec: The spec it was loaded from, with device and dtype resolved.
        load_seconds: How long the load took, its base included where that was loaded too, and the import of libraries
            not.
    """

    key: Key
    backend: Any
    model_spec: ModelSpec
    load_seconds: float


class TakesBack(Protocol):
    """Who gave a lease, and takes it back: the `Ledger`.

    Attributes:
        dropped: Leases that were collected before they were released.
    """

    dropped: deque[tuple[Entry, Claim]]

    def release(self, entry: Entry, claim: Claim) -> object:
        """Give a claim up."""
        ...


@final
class Lease:
    """A claim on an entry, which is not evicted before `release`; also a context manager that gives the backend.

    A lease that is dropped without a release counts as released once it is collected.

    Attributes:
        cached: What is leased.
    """

    __slots__ = ("__weakref__", "_claim", "_entry", "_ledger", "cached")

    def __init__(self, ledger: TakesBack, entry: Entry, claim: Claim, cached: CachedBackend) -> None:
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
