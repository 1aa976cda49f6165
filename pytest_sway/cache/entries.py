"""The records of the cache: entries, claims, operations and leases. They neither lock nor load."""

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
"""Bytes by part; backends that share a part, such as a base, use the same key for it."""


__tracebackhide__ = True


class State(enum.Enum):
    """The state of an entry. An entry passes through the states from top to bottom."""

    QUEUED = "waiting for room"
    LOADING = "loading"
    READY = "ready"
    CLOSING = "closing"
    GONE = "gone"


RESIDENT: Final = frozenset({State.LOADING, State.READY, State.CLOSING})


@dataclass(slots=True, eq=False)
class Claim:
    """The record of one lease in its entry.

    Attributes:
        holder: The holder's name, for messages.
        owner: The test or fixture with which the lease ends at the latest.
        thread: The thread that asked.
    """

    holder: str
    owner: Owner
    thread: threading.Thread

    @property
    def orphaned(self) -> bool:
        """Whether the thread that took the lease has ended without releasing it."""
        return not self.owner.keeps and not self.thread.is_alive()

    def ends_without(self, asker: Operation) -> bool:
        """Whether the lease can end while ``asker`` waits. Only the main thread can release an ended thread's lease."""
        if self.owner.keeps and self.holder == asker.holder:
            return False
        return asker.thread is not (threading.main_thread() if self.orphaned else self.thread)


@dataclass(slots=True, eq=False)
class Operation:
    """The record of what one call has taken from the cache, so that an error or interrupt can give it back.

    Attributes:
        holder: The name that messages show when the cache is full.
        owner: The test or fixture that owns the lease.
        thread: The calling thread, as an object, since thread numbers are reused.
        entry: The entry that this call loads.
        built: The backend, between its build and its admission.
        victims: Entries that this call has set to CLOSING.
        waits_for: The entry whose load this call waits for.
        lease: The lease, once granted; to a waiting call, the loading thread grants it.
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
    """One generation of one key, from its first request until it is closed.

    Attributes:
        key: Its identity.
        spec: Its resolved spec.
        leader: The operation that loads it, until it is READY.
        state: Its state.
        cached: The loaded backend, once it is READY.
        parts: Its bytes by part: estimated while LOADING, measured once READY; ``None`` if unknown.
        claims: Its leases.
        waiters: The operations that wait for its load.
        closers: Its ``close()``, until it was called; see `pytest_sway.system.locking.close_all`.
        close_begun: Whether ``close()`` may have begun, so that nobody may get it any more.
        closing_thread: The thread that closes it, once it is CLOSING.
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
    close_begun: bool = False
    closing_thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether it may be evicted."""
        return self.state is State.READY and not self.claims

    def ends_without(self, asker: Operation) -> bool:
        """Whether the entry can become idle or gone while ``asker`` waits."""
        if self.state is State.READY:
            return all(claim.ends_without(asker) for claim in self.claims)
        worker = self.closing_thread if self.state is State.CLOSING else self.leader and self.leader.thread
        return worker is not asker.thread

    @property
    def occupation(self) -> str:
        """The reason why it cannot be evicted, for messages."""
        if self.state is State.READY and self.claims:
            return "held by " + ", ".join(sorted({claim.holder for claim in self.claims}))
        return self.state.value


@dataclass(frozen=True, slots=True)
class CachedBackend:
    """A backend in the cache.

    Attributes:
        key: Its identity, from `pytest_sway.backends.registry.cache_key_for`.
        backend: The live backend.
        model_spec: Its spec. For kinds hf and mlx, its device and dtype are resolved; for others they may be ``auto``.
        load_seconds: Seconds that the load took, with the base if that was loaded too, without imports of libraries.
    """

    key: Key
    backend: Any
    model_spec: ModelSpec
    load_seconds: float


class TakesBack(Protocol):
    """The part of `Ledger` that a `Lease` uses.

    Attributes:
        dropped: Leases that were garbage-collected before they were released.
    """

    dropped: deque[tuple[Entry, Claim]]

    def release(self, entry: Entry, claim: Claim) -> object:
        """End the lease of a claim."""
        ...


@final
class Lease:
    """A lease on a backend, which is not evicted before `release`. As a context manager it gives the backend.

    A lease that you drop without a release counts as released once it is garbage-collected.

    Attributes:
        cached: The leased backend, with its spec and key.
    """

    __slots__ = ("__weakref__", "_claim", "_entry", "_ledger", "cached")

    def __init__(self, ledger: TakesBack, entry: Entry, claim: Claim, cached: CachedBackend) -> None:
        self._ledger = ledger
        self._entry = entry
        self.cached = cached
        self._claim = claim  # last, so that __del__ ignores a lease whose creation was interrupted

    @property
    def backend(self) -> Any:
        """The leased backend."""
        return self.cached.backend

    def release(self) -> None:
        """End the lease. You may call this twice, and from any thread."""
        self._ledger.release(self._entry, self._claim)

    def __enter__(self) -> Any:
        return self.backend

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not isinstance(error, GeneratorExit):  # else garbage collection may have closed the generator: see __del__
            self.release()

    def __del__(self) -> None:
        # Garbage collection can run while this thread holds the lock, so the next step of the ledger does the release.
        if hasattr(self, "_claim") and self._claim in self._entry.claims:
            self._ledger.dropped.append((self._entry, self._claim))
