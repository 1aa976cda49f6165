"""`Ledger`: the book of what a cache holds, who leases it and who waits for it.

Its public methods are the steps of the cache's operations. Each is atomic, and each can be repeated, since an interrupt
can strike anywhere; none loads, closes or waits.
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
from pytest_sway.system.forking import call_in_forked_child
from pytest_sway.system.locking import OneShotEvent, atomic

if TYPE_CHECKING:
    from pytest_sway.cache.owners import Owner
    from pytest_sway.cache.stats import SwayStats
    from pytest_sway.errors import CacheFullError, SwayError
    from pytest_sway.spec.identity import Key
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_PATIENCE_WITH_ENDED_THREADS: Final = 10.0
"""Seconds that a request waits for a lease whose thread has ended, which few release and the main thread may."""


@final
class Ledger:
    """The entries of one cache; after a fork, the child's is empty.

    Args:
        budget: What may be resident.
        stats: What happened so far.
        remedy: What to do when there is no room, at the end of a sentence.
        release: Ends a lease.

    Attributes:
        release: Ends a lease.
        dropped: Leases that were collected before they were released.
    """

    def __init__(self, budget: Budget, stats: SwayStats, remedy: str, release: Callable[[Entry, Claim], None]) -> None:
        self._budget: Final = budget
        self._stats: Final = stats
        self._remedy: Final = remedy
        self.release: Final = release
        self._start_empty()
        call_in_forked_child(self._start_empty)

    def _start_empty(self) -> None:
        """Begin with nothing: as a new cache does, and as a forked child's must, whose locks nobody will free."""
        self._lock = threading.Lock()
        self._changed = OneShotEvent()
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._retired: list[Entry] = []
        self._waiting: dict[threading.Thread, Operation] = {}
        self.dropped: deque[tuple[Entry, Claim]] = deque()
        self._shut = False

    # --- snapshots ----------------------------------------------------------------------------------------------------

    @atomic
    def loaded_keys(self) -> list[Key]:
        """The keys of what is ready now, most recently used last."""
        return [entry.key for entry in self._entries.values() if entry.state is State.READY]

    @atomic
    def loaded_specs(self) -> list[ModelSpec]:
        """The specs of what is ready now, most recently used last."""
        return [entry.spec for entry in self._entries.values() if entry.state is State.READY]

    @atomic
    def leased(self) -> list[CachedBackend]:
        """What is leased now and not retired."""
        self._collect_dropped()
        return [entry.cached for entry in self._entries.values() if entry.claims and entry.cached is not None]

    @atomic
    def ready(self) -> list[CachedBackend]:
        """What is ready now, leased or idle, most recently used last; not what is retired."""
        return [e.cached for e in self._entries.values() if e.state is State.READY and e.cached is not None]

    @atomic
    def residents(self) -> list[Entry]:
        """What counts towards the cap, least recently used first; what is retired before all else."""
        return self._residents()

    # --- the steps ----------------------------------------------------------------------------------------------------

    @atomic
    def try_to_claim(self, operation: Operation, spec: ModelSpec, key: Key) -> Lease | OneShotEvent | None:
        """Lease what is ready, wait for what is loading, or (``None``) lead the load of what is neither."""
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
            self._entries.move_to_end(key)
            self._stats.backend(str(spec)).hits += 1
            return self._grant(entry, operation)
        if entry.state is not State.CLOSING:
            self._join(operation, entry)
        elif entry.closing_thread is operation.thread:
            raise messages.close_asks_for_itself(spec)
        return self._changed

    @atomic
    def stop_waiting(self, operation: Operation) -> None:
        """Take the operation from among those who wait for a load."""
        self._waiting.pop(operation.thread, None)
        operation.error = None

    @atomic
    def reserve(
        self, operation: Operation, estimate: SizeByPart | None, since: float, patience: float
    ) -> OneShotEvent | None:
        """Take room for the operation's entry, which is LOADING from then on; or, to come again, victims to close.

        Returns:
            ``None`` if there is room; else what to wait for, unless there are victims to close.
        """
        newcomer = cast("Entry", operation.entry)
        newcomer.parts = estimate
        self._collect_dropped()
        if self._shut:
            raise messages.shut_down(f"before {newcomer.spec} was loaded")
        if operation.owner.over:
            raise messages.ended(newcomer.spec, operation.owner.name)
        victims = self._budget.victims(self._residents(), newcomer)
        if victims == []:
            newcomer.state = State.LOADING
            self._note_peaks()
            return None
        if victims is not None:
            self._evict(operation, victims)
            return self._changed
        if self._never_fits(newcomer, operation):
            raise self._full(newcomer, f"all of it is in use by the one who asks{self._or_by_ended_threads()}")
        abandoned = patience > _PATIENCE_WITH_ENDED_THREADS and self._waits_for_ended_threads(newcomer, operation)
        patience = _PATIENCE_WITH_ENDED_THREADS if abandoned else patience
        if time.monotonic() >= since + patience:
            left = self._or_by_ended_threads() if abandoned else ""
            error = self._full(newcomer, f"none of it came free within {patience:g} s{left}")
            self._refuse(list(newcomer.waiters), error)
            raise error
        return self._changed

    @atomic
    def admit(self, operation: Operation, seconds: float, parts: SizeByPart | None) -> Lease:
        """Make the loaded entry READY and grant all who waited their leases, in one step."""
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
        self._dismiss_waiters(entry)
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
            self._refuse(list(entry.waiters), error)
        if began or not isinstance(error, CacheError | BackendUseError):  # what was refused is no failed load
            self._stats.backend(str(entry.spec)).failures += 1
            self._note("failure", entry)

    @atomic
    def retire(self, operation: Operation, chosen: Callable[[Entry], bool]) -> None:
        """Take the chosen entries out of the map; what is idle of them is the operation's to close."""
        leaving = [entry for entry in self._entries.values() if entry.claims and chosen(entry)]
        staying = [entry for entry in self._entries.values() if entry not in leaving]
        # In one assignment, which an interrupt cannot split.
        self._retired, self._entries = [*self._retired, *leaving], OrderedDict((entry.key, entry) for entry in staying)
        self._take(operation, [entry for entry in self._residents() if entry.idle and chosen(entry)])
        self._announce()

    @atomic
    def unclaim(self, entry: Entry, claim: Claim) -> bool:
        """Strike a lease out; return whether something that was retired is idle now."""
        self._collect_dropped()
        entry.claims.discard(claim)
        self._announce()
        return any(entry.idle for entry in self._retired)

    @atomic
    def take_retired(self, operation: Operation) -> None:
        """Make what was retired and is idle the operation's to close."""
        self._take(operation, [entry for entry in self._retired if entry.idle])
        self._announce()

    @atomic
    def unclaim_all(self, operation: Operation, owner: Owner) -> None:
        """Strike out all leases of an owner, for good; what was retired and is idle now is the operation's to close."""
        owner.over = True
        for entry in self._residents():
            entry.claims.difference_update([claim for claim in entry.claims if claim.owner is owner])
        self._take(operation, [entry for entry in self._retired if entry.idle])
        self._announce()

    @atomic
    def forget(self, operation: Operation, entry: Entry) -> CachedBackend | None:
        """Let go of an entry whose close has been called; return what was in it, the first time."""
        if entry.closers:  # an interrupt came before the close: the entry lives on
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
        """Refuse every request that comes later."""
        self._shut = True
        self._announce()

    @atomic
    def under_way(self) -> OneShotEvent | None:
        """What to wait for while other threads load or close."""
        me = Operation("")
        entries = (*self._retired, *self._entries.values())
        under_way = any(entry.state is not State.READY and entry.ends_without(me) for entry in entries)
        return self._changed if under_way else None

    @atomic
    def revoke_leases(self) -> list[str]:
        """Strike all leases out; return their holders."""
        self._collect_dropped()
        holders = [claim.holder for entry in self._residents() for claim in entry.claims]
        for entry in self._residents():
            entry.claims.clear()
        return holders

    @atomic
    def evict_idle(self, operation: Operation) -> None:
        """Make all that is idle the operation's to close, to make room."""
        self._evict(operation, self._idle())

    @atomic
    def take_idle(self, operation: Operation) -> None:
        """Make all that is idle the operation's to close, at the end."""
        self._take(operation, self._idle())

    @atomic
    def undo(self, operation: Operation) -> None:
        """Give back all that the operation's record names."""
        entry, lease = operation.entry, operation.lease
        self._waiting.pop(operation.thread, None)
        if operation.waits_for is not None and operation in operation.waits_for.waiters:
            operation.waits_for.waiters.remove(operation)
        if lease is not None:
            lease._entry.claims.discard(lease._claim)
        if entry is not None:
            self._dismiss_waiters(entry)  # they look again, and one of them takes over
            if entry.state in (State.QUEUED, State.LOADING):
                self._detach(entry)
        for victim in operation.victims:
            if victim.state is State.CLOSING and victim.closers:
                victim.state = State.READY  # its close was not called: it lives on
            elif victim.state is not State.READY:
                self._detach(victim)
        operation.built.clear()
        operation.victims.clear()
        operation.lease = operation.error = operation.waits_for = None
        self._announce()

    # --- parts of steps, under the lock -------------------------------------------------------------------------------

    def _residents(self) -> list[Entry]:
        return [entry for entry in (*self._retired, *self._entries.values()) if entry.state in RESIDENT]

    def _idle(self) -> list[Entry]:
        return [entry for entry in self._residents() if entry.idle]

    def _announce(self) -> None:
        """Wake all who wait, to look again."""
        event, self._changed = self._changed, OneShotEvent()
        event.set()

    def _grant(self, entry: Entry, operation: Operation) -> Lease:
        claim = Claim(operation.holder, operation.owner, operation.thread)
        lease = Lease(self, entry, claim, cast("CachedBackend", entry.cached))
        entry.claims.add(claim)
        return lease

    def _join(self, operation: Operation, entry: Entry) -> None:
        """Wait for the load of another, unless that waits for us."""
        if operation.waits_for is entry:
            return
        if any(leader.thread is operation.thread for leader in self._leaders(entry)):
            raise messages.load_asks_for_itself(entry.spec)
        operation.waits_for = entry
        self._waiting[operation.thread] = operation
        entry.waiters.append(operation)

    def _leaders(self, entry: Entry | None) -> Iterator[Operation]:
        """Who loads ``entry``, who loads what that one waits for, and so on."""
        while entry is not None and entry.leader is not None:
            yield entry.leader
            waiting = self._waiting.get(entry.leader.thread)
            entry = None if waiting is None else waiting.waits_for

    def _never_fits(self, newcomer: Entry, asker: Operation) -> bool:
        """Whether there is no room even when all has ended that can end while this one waits."""
        return not self._budget.allows([*(e for e in self._residents() if not e.ends_without(asker)), newcomer])

    def _waits_for_ended_threads(self, newcomer: Entry, asker: Operation) -> bool:
        """Whether there is room only if somebody releases what a thread has left that ended."""
        left = [entry for entry in self._residents() if any(claim.orphaned for claim in entry.claims)]
        staying = [entry for entry in self._residents() if entry in left or not entry.ends_without(asker)]
        return bool(left) and not self._budget.allows([*staying, newcomer])

    def _or_by_ended_threads(self) -> str:
        orphaned = any(claim.orphaned for entry in self._residents() for claim in entry.claims)
        return ", or was leased in a thread that has ended and did not release it" if orphaned else ""

    def _refuse(self, waiters: Iterable[Operation], error: SwayError) -> None:
        for waiter in waiters:
            waiter.error = error
            self._waiting.pop(waiter.thread, None)
            if waiter.waits_for is not None and waiter in waiter.waits_for.waiters:
                waiter.waits_for.waiters.remove(waiter)
        self._announce()

    def _dismiss_waiters(self, entry: Entry) -> None:
        for waiter in entry.waiters:
            self._waiting.pop(waiter.thread, None)
        entry.waiters.clear()

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
        entry.state = State.GONE  # last, so that a detachment that was interrupted is tried again

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
