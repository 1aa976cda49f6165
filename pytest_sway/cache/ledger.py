"""`Ledger`: the entries of a cache, their leases and their waiters.

Its public methods are the steps of the cache's operations. Each is atomic and can be repeated, since an interrupt can
come at any line. None of them loads, closes or waits.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final, cast, final

from pytest_sway.backends.contract import closers_of
from pytest_sway.cache import messages
from pytest_sway.cache.budget import Budget, total_bytes
from pytest_sway.cache.entries import RESIDENT, CachedBackend, Claim, Entry, Lease, Operation, SizeByPart, State
from pytest_sway.errors import BackendUseError, CacheError
from pytest_sway.system.locking import OneShotEvent, atomic, call_in_forked_child

if TYPE_CHECKING:
    from pytest_sway.cache.owners import Owner
    from pytest_sway.cache.stats import SwayStats
    from pytest_sway.errors import CacheFullError, SwayError
    from pytest_sway.spec.identity import Key
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_PATIENCE_WITH_ENDED_THREADS: Final = 10.0
"""Seconds that a request waits for an ended thread's lease, which at best the main thread releases."""


@final
class Ledger:
    """The entries of one cache. In a forked child it is empty.

    Args:
        budget: The bounds.
        stats: The counts to update.
        remedy: Advice that ends the message of a `CacheFullError`.
        release: Ends a lease.

    Attributes:
        release: Ends a lease.
        dropped: Leases that were garbage-collected before they were released.
    """

    def __init__(self, budget: Budget, stats: SwayStats, remedy: str, release: Callable[[Entry, Claim], None]) -> None:
        self._budget: Final = budget
        self._stats: Final = stats
        self._remedy: Final = remedy
        self.release: Final = release
        self._start_empty()
        call_in_forked_child(self._start_empty)

    def _start_empty(self) -> None:
        """Reset to no entries and a new lock. A forked child needs this, since nobody there frees the parent's lock."""
        self._lock = threading.Lock()
        self._changed: OneShotEvent | None = None
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._retired: list[Entry] = []
        self.dropped: deque[tuple[Entry, Claim]] = deque()
        self._shut = False

    # --- snapshots ----------------------------------------------------------------------------------------------------

    @atomic
    def leased(self) -> list[CachedBackend]:
        """Return the leased backends, without retired ones."""
        self._collect_dropped()
        return [entry.cached for entry in self._entries.values() if entry.claims and entry.cached is not None]

    @atomic
    def owners_of(self, cached: CachedBackend) -> set[Owner]:
        """Return the owners of a backend's leases, also of a retired one."""
        self._collect_dropped()
        return {claim.owner for entry in self._residents() if entry.cached is cached for claim in entry.claims}

    @atomic
    def ready(self) -> list[CachedBackend]:
        """Return the ready backends, leased or idle, most recently used last, without retired ones."""
        return [e.cached for e in self._entries.values() if e.state is State.READY and e.cached is not None]

    @atomic
    def residents(self) -> list[Entry]:
        """Return all entries that are loading, ready or closing: first retired ones, then least recently used first."""
        return self._residents()

    # --- the steps ----------------------------------------------------------------------------------------------------

    @atomic
    def use(self, spec: ModelSpec, key: Key, owner: Owner) -> CachedBackend | None:
        """Return what is ready, as most recently used and without a lease; ``None`` where more is to do than that."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not State.READY or self._shut or owner.over or self.dropped or self._retired:
            return None
        return self._hit(entry, spec)

    @atomic
    def try_to_claim(self, operation: Operation, spec: ModelSpec, key: Key) -> Lease | OneShotEvent | None:
        """Return a lease if the entry is ready, or an event to wait for, or ``None`` if the caller should load it."""
        self._collect_dropped()
        if operation.lease is not None:
            return operation.lease
        if operation.error is not None:
            raise operation.error
        if self._shut:
            raise messages.shut_down(f"before {spec} was asked for")
        if operation.owner.over:
            raise messages.ended(spec, operation.owner.name)
        entry = self._entries.get(key)
        if entry is None:
            operation.entry = self._entries[key] = Entry(key, spec, operation)
            return None
        if entry.state is State.READY:
            self._hit(entry, spec)
            return self._grant(entry, operation)
        if entry.state is not State.CLOSING:
            self._join(operation, entry)
        elif entry.closing_thread is operation.thread:
            raise messages.close_asks_for_itself(spec)
        return self._change()

    @atomic
    def stop_waiting(self, operation: Operation) -> None:
        """Remove the operation from the waiters of a load."""
        self._leave(operation)
        operation.error = None

    @atomic
    def reserve(
        self, operation: Operation, estimate: SizeByPart | None, since: float, patience: float
    ) -> OneShotEvent | None:
        """Make the operation's entry LOADING if there is room; else choose victims for the operation to close.

        Returns:
            ``None`` if there is room. Else close the victims, or wait for this event if there are none, and call again.
        """
        newcomer = cast("Entry", operation.entry)
        newcomer.parts = estimate
        self._collect_dropped()
        if self._shut:
            raise messages.shut_down(f"before {newcomer.spec} was loaded")
        if operation.owner.over:
            raise messages.ended(newcomer.spec, operation.owner.name)
        residents = self._residents()
        victims = self._budget.victims(residents, newcomer)
        if victims == []:
            newcomer.state = State.LOADING
            self._note_peaks()
            return None
        if victims is not None:
            self._evict(operation, victims)
            return self._change()
        if self._budget.never_allows(residents, newcomer, operation):
            raise self._full(newcomer, f"all of them are in use by the caller{self._ended_threads()}")
        abandoned = patience > _PATIENCE_WITH_ENDED_THREADS and self._budget.waits_for_ended_threads(
            residents, newcomer, operation
        )
        patience = _PATIENCE_WITH_ENDED_THREADS if abandoned else patience
        if time.monotonic() >= since + patience:
            left = self._ended_threads() if abandoned else ""
            error = self._full(newcomer, f"none of them was released within {patience:g} s{left}")
            self._refuse(newcomer, error)
            raise error
        return self._change()

    @atomic
    def admit(self, operation: Operation, seconds: float, parts: SizeByPart | None) -> Lease:
        """Make the loaded entry READY and grant leases to the operation and to all waiters."""
        entry = cast("Entry", operation.entry)
        if self._shut:
            raise messages.shut_down(f"while {entry.spec} was loading")
        entry.parts = parts if parts is not None else entry.parts
        size, max_bytes = total_bytes([entry]), self._budget.max_bytes
        if size is not None and max_bytes is not None and size > max_bytes:
            raise messages.turned_out_too_large(entry.spec, size, max_bytes)
        entry.closers[:] = closers_of(operation.built)
        entry.cached = CachedBackend(entry.key, operation.built[0], entry.spec, seconds)
        entry.state = State.READY
        operation.built.clear()
        operation.lease = self._grant(entry, operation)
        stats = self._stats.backend(str(entry.spec))
        for waiter in entry.waiters:
            waiter.lease = self._grant(entry, waiter)
            stats.hits += 1
        entry.waiters.clear()
        entry.leader = None  # else the leader's lease would live as long as the entry
        self._entries.move_to_end(entry.key)
        stats.loads += 1
        stats.load_seconds += seconds
        self._note_peaks()
        self._note("load", entry, seconds=seconds)
        self._evict(operation, self._budget.surplus(self._residents(), entry))
        self._announce()
        return operation.lease

    @atomic
    def fail(self, operation: Operation, error: SwayError) -> None:
        """Give waiters the load's error. If the load never began, they try it themselves."""
        entry = cast("Entry", operation.entry)
        began = entry.state is State.LOADING
        if began:
            self._refuse(entry, error)
        if began or not isinstance(error, CacheError | BackendUseError):  # a refused request is no failed load
            self._stats.backend(str(entry.spec)).failures += 1
            self._note("failure", entry)

    @atomic
    def retire(self, operation: Operation, chosen: Callable[[Entry], bool]) -> None:
        """Retire the chosen entries; the operation gets those that are idle, to close."""
        self._collect_dropped()
        leaving = [entry for entry in self._entries.values() if entry.claims and chosen(entry)]
        staying = [entry for entry in self._entries.values() if entry not in leaving]
        # In one assignment, which an interrupt cannot split.
        self._retired, self._entries = [*self._retired, *leaving], OrderedDict((entry.key, entry) for entry in staying)
        self._take(operation, [entry for entry in self._residents() if entry.idle and chosen(entry)])
        self._announce()

    @atomic
    def unclaim(self, entry: Entry, claim: Claim) -> bool:
        """Remove a claim; return whether a retired entry is idle now."""
        self._collect_dropped()
        entry.claims.discard(claim)
        self._announce()
        return bool(self._retired) and any(entry.idle for entry in self._retired)

    @atomic
    def take_retired(self, operation: Operation) -> None:
        """Give the operation all retired entries that are idle, to close."""
        self._collect_dropped()
        self._take(operation, [entry for entry in self._retired if entry.idle])
        self._announce()

    @atomic
    def unclaim_all(self, operation: Operation, owner: Owner) -> None:
        """Remove all claims of an owner for good; the operation gets retired entries that are idle now, to close."""
        owner.over = True
        for entry in self._residents():
            entry.claims.difference_update([claim for claim in entry.claims if claim.owner is owner])
        self._take(operation, [entry for entry in self._retired if entry.idle])
        self._announce()

    @atomic
    def forget(self, operation: Operation, entry: Entry) -> CachedBackend | None:
        """Remove a closed entry; return its backend, the first time only."""
        if entry.closers:  # an interrupt came before the end of the close, so `undo` retires it
            return None
        self._detach(entry)
        self._announce()
        if entry.cached is not None:
            self._note("close", entry)
        cached, entry.cached = entry.cached, None
        if entry in operation.victims:
            operation.victims.remove(entry)
        return cached

    @atomic
    def note_hits(self) -> None:
        """Put the hits since the last event into the log."""
        self._stats.log.note_hits(self._stats.backends)

    @atomic
    def refuse_from_now_on(self) -> None:
        """Refuse every later request."""
        self._shut = True
        self._announce()

    @atomic
    def under_way(self) -> OneShotEvent | None:
        """Return an event to wait for while other threads load or close; ``None`` if none does."""
        me = Operation("")
        entries = (*self._retired, *self._entries.values())
        under_way = any(entry.state is not State.READY and entry.ends_without(me) for entry in entries)
        return self._change() if under_way else None

    @atomic
    def revoke_leases(self) -> list[str]:
        """Remove all claims; return their holders."""
        self._collect_dropped()
        holders = [claim.holder for entry in self._residents() for claim in entry.claims]
        for entry in self._residents():
            entry.claims.clear()
        return holders

    @atomic
    def evict_idle(self, operation: Operation) -> None:
        """Give the operation all idle entries to close, and count them as evictions."""
        self._evict(operation, self._idle())

    @atomic
    def take_idle(self, operation: Operation) -> None:
        """Give the operation all idle entries to close, without counting them as evictions."""
        self._take(operation, self._idle())

    @atomic
    def undo(self, operation: Operation) -> None:
        """Give back everything in the operation's record."""
        entry, lease = operation.entry, operation.lease
        self._leave(operation)
        if lease is not None:
            lease._entry.claims.discard(lease._claim)
        if entry is not None:
            entry.waiters.clear()  # they try to claim again, and one of them takes over
            if entry.state in (State.QUEUED, State.LOADING):
                self._part_with(entry)
        for victim in operation.victims:
            if victim.state is State.CLOSING and not victim.close_begun:
                victim.state = State.READY
            elif victim.state is not State.READY:
                self._part_with(victim)
        operation.built.clear()
        operation.victims.clear()
        operation.lease = operation.error = operation.waits_for = None
        self._announce()

    # --- parts of steps, under the lock -------------------------------------------------------------------------------

    def _residents(self) -> list[Entry]:
        return [entry for entry in (*self._retired, *self._entries.values()) if entry.state in RESIDENT]

    def _idle(self) -> list[Entry]:
        self._collect_dropped()
        return [entry for entry in self._residents() if entry.idle]

    def _announce(self) -> None:
        """Wake all waiting threads, so that they look again."""
        event, self._changed = self._changed, None
        if event is not None:
            event.set()

    def _change(self) -> OneShotEvent:
        """Return the event of the next change. It is made on demand, since most requests find their entry ready."""
        if self._changed is None:
            self._changed = OneShotEvent()
        return self._changed

    def _hit(self, entry: Entry, spec: ModelSpec) -> CachedBackend:
        self._entries.move_to_end(entry.key)  # this object is found sooner than an equal one
        self._stats.backend(str(spec)).hits += 1
        return cast("CachedBackend", entry.cached)

    def _grant(self, entry: Entry, operation: Operation) -> Lease:
        claim = Claim(operation.holder, operation.owner, operation.thread)
        lease = Lease(self, entry, claim, cast("CachedBackend", entry.cached))
        entry.claims.add(claim)
        return lease

    def _join(self, operation: Operation, entry: Entry) -> None:
        """Record that the operation waits for the entry's load; raise if that load waits for the operation."""
        if operation.waits_for is entry:
            return
        if any(leader.thread is operation.thread for leader in self._leaders(entry)):
            raise messages.load_asks_for_itself(entry.spec)
        operation.waits_for = entry
        entry.waiters.append(operation)

    def _leave(self, operation: Operation) -> None:
        if operation.waits_for is not None and operation in operation.waits_for.waiters:
            operation.waits_for.waiters.remove(operation)

    def _leaders(self, entry: Entry | None) -> Iterator[Operation]:
        """Yield the operation that loads ``entry``, then the one that this waits for, and so on."""
        while entry is not None and entry.leader is not None:
            yield entry.leader
            entry = self._awaited_by(entry.leader.thread)

    def _awaited_by(self, thread: threading.Thread) -> Entry | None:
        """Return the entry for whose load a thread waits."""
        entries = self._entries.values()
        return next((entry for entry in entries if any(waiter.thread is thread for waiter in entry.waiters)), None)

    def _ended_threads(self) -> str:
        orphaned = any(claim.orphaned for entry in self._residents() for claim in entry.claims)
        return "; a thread ended without releasing its lease" if orphaned else ""

    def _refuse(self, entry: Entry, error: SwayError) -> None:
        """Give the error to all who wait for the entry's load."""
        for waiter in entry.waiters:
            waiter.error = error
        entry.waiters.clear()
        self._announce()

    def _evict(self, operation: Operation, victims: list[Entry]) -> None:
        for victim in victims:
            self._stats.backend(str(victim.spec)).evictions += 1
            self._note("evict", victim)
        self._take(operation, victims)

    def _take(self, operation: Operation, victims: Iterable[Entry]) -> None:
        for victim in victims:
            operation.victims.append(victim)
            victim.closing_thread = operation.thread
            victim.state = State.CLOSING

    def _detach(self, entry: Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        if entry in self._retired:
            self._retired.remove(entry)
        entry.state = State.GONE  # last, so that an interrupted call is repeated

    def _part_with(self, entry: Entry) -> None:
        """Remove an entry. If its close is to be called again after an interrupt, it is retired."""
        if not entry.closers:
            self._detach(entry)
            return
        if entry not in self._retired:
            self._retired.append(entry)
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        entry.leader = None
        entry.state = State.READY  # last, so that an interrupted call is repeated

    def _collect_dropped(self) -> None:
        while self.dropped:
            entry, claim = self.dropped[0]
            entry.claims.discard(claim)
            self.dropped.popleft()

    def _note_peaks(self) -> None:
        residents = self._residents()
        self._stats.peak_resident = max(self._stats.peak_resident, len(residents))
        self._stats.peak_bytes = max(self._stats.peak_bytes, total_bytes(e for e in residents if e.parts) or 0)

    def _note(self, event: str, entry: Entry, seconds: float | None = None) -> None:
        self._stats.log.note_hits(self._stats.backends)  # those before this event come before it in the log
        self._stats.log.note(
            event,
            str(entry.spec),
            seconds=seconds,
            nbytes=total_bytes([entry]),
            resident=total_bytes(self._residents()),
        )

    def _full(self, newcomer: Entry, why: str) -> CacheFullError:
        return messages.full(newcomer, self._residents(), self._budget, why, self._remedy)
