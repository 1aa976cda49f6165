"""What the cache holds, what fits beside it, and who has to go: records and arithmetic, no locks and no loading."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from pytest_sway.cache import CachedBackend, Lease
    from pytest_sway.spec import Key, ModelSpec

Parts: TypeAlias = Mapping[Hashable, int]
"""Bytes by part; backends that share a part, such as a base, name it by the same key."""


class State(enum.Enum):
    """Where an entry stands; it only ever goes downwards."""

    QUEUED = "waiting for room"
    LOADING = "loading"
    READY = "ready"
    CLOSING = "closing"
    GONE = "gone"


RESIDENT: Final = frozenset({State.LOADING, State.READY, State.CLOSING})


@dataclass(slots=True, eq=False)
class Owner:
    """Whose leases are, such as a test: they end with it, whichever thread asked, and it gets no others then.

    Attributes:
        name: Who is named to others when the cache is full.
        keeps: It gives back nothing before its end, so that what it asks for meanwhile cannot wait for that.
        over: It has ended.
    """

    name: str
    keeps: bool = False
    over: bool = False


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
    parts: Parts | None = None
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
class Budget:
    """What may be resident at one time.

    Attributes:
        max_size: Backends, at least 1.
        max_bytes: Bytes of weights, or ``None`` for no bound.
    """

    max_size: int
    max_bytes: int | None

    def allows(self, entries: Iterable[Entry]) -> bool:
        """Whether these may be resident together; one of unknown size takes up all the bytes."""
        together = list(entries)
        if len(together) > self.max_size:
            return False
        if self.max_bytes is None or len(together) <= 1:
            return True
        total = total_bytes(together)
        return total is not None and total <= self.max_bytes

    def victims(self, residents: Iterable[Entry], newcomer: Entry) -> list[Entry] | None:
        """The idle entries to close so that ``newcomer`` fits, least recently used first; ``None`` if it cannot fit.

        Args:
            residents: What is resident, least recently used first.
            newcomer: What is to be loaded, with its estimated parts.
        """
        oldest_idle, fits = self._oldest_idle(residents, newcomer)
        return oldest_idle if fits else None

    def surplus(self, residents: Iterable[Entry], newest: Entry) -> list[Entry]:
        """The idle entries to close because ``newest`` turned out larger than was estimated."""
        return self._oldest_idle([entry for entry in residents if entry is not newest], newest)[0]

    def _oldest_idle(self, residents: Iterable[Entry], newcomer: Entry) -> tuple[list[Entry], bool]:
        """The idle entries without which ``newcomer`` fits, or all of them; and whether it fits then."""
        staying = list(residents)
        victims: list[Entry] = []
        for entry in [entry for entry in staying if entry.idle]:
            if self.allows([*staying, newcomer]):
                break
            staying.remove(entry)
            victims.append(entry)
        return victims, self.allows([*staying, newcomer])


def total_bytes(entries: Iterable[Entry]) -> int | None:
    """The bytes of these together, each part counted once; ``None`` if one's size is unknown."""
    parts: dict[Hashable, int] = {}
    for entry in entries:
        if entry.parts is None:
            return None
        for part, size in entry.parts.items():
            parts[part] = max(size, parts.get(part, 0))
    return sum(parts.values())


def closers_of(built: Iterable[Any]) -> list[Callable[[], object]]:
    """The ``close`` methods of what was built; what has none is merely dropped."""
    closes = (getattr(backend, "close", None) for backend in built)
    return [close for close in closes if callable(close)]


def format_bytes(size: int) -> str:
    """``size`` for people, in binary units: ``1.5 GiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def format_parts(parts: Parts | None) -> str:
    """The size of something for people, where it is known."""
    return "an unknown size" if parts is None else format_bytes(sum(parts.values()))
