"""`BackendCache`: an LRU cache of live backends that are leased, evicted and closed.

Its invariants, each with a test of its number:

 1. Per key at most one load runs at a time, and all who wait for it get the same object.
 2. ``close()`` never starts while the entry is leased.
 3. Each loaded backend is closed at most once, and exactly once after `BackendCache.shutdown`.
 4. loading + ready + closing <= max_size, always: room is made before the load.
 5. Becoming READY and granting leases to those who waited is one atomic step.
 6. A CLOSING entry is never handed out; who asks for it waits, then gets a new one.
 7. The victim is the least recently used idle entry.
 8. A late completion, release or eviction of one generation never touches the next.
 9. A failed load is not cached: leader and waiters get the error, and the next call tries again.
10. An interrupted load undoes its reservation; the interrupt goes up where it struck, and a waiter takes over.
11. A ``close()`` that raises fails nobody else's request.
12. Backends without ``close()`` are dropped.
13. When nothing is in flight, no waiter or error is left, and none keeps a backend alive.
14. A load that waits for itself, also through other threads, gets an error, not a deadlock.
15. Releasing a lease twice is harmless, from any thread.
16. A base is loaded once, closed after its last adapter, and its bytes count once.
17. When all that is resident is leased by who asks, `CacheFullError` comes at once; else the request waits.
18. With a byte budget, sizes are estimated before the load, and unknown counts as the whole budget.
19. After a fork the child starts empty and closes nothing of its parent's.
20. `BackendCache.evict_all` closes every idle entry even when some raise, and can be called twice.

How a request goes: `acquire` opens an `Operation`, its record of what it has taken. The atomic methods are the only
ones that touch the entries. Between them, outside the lock, backends are loaded and closed. Whatever exception comes
up, `_abandon` gives back all that the operation's record names; every step may be repeated, since an interrupt can
strike in the clean-up too.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, cast, final

from pytest_sway.building import Build, Listener, informed
from pytest_sway.errors import (
    BackendLoadError,
    CacheClosedError,
    CacheDeadlockError,
    CacheFullError,
    ModelTooLargeError,
    SwayError,
)
from pytest_sway.forking import call_in_forked_child
from pytest_sway.monitor import Bell, atomic
from pytest_sway.redaction import redact_error, redacted
from pytest_sway.residency import (
    RESIDENT,
    Budget,
    Claim,
    Entry,
    Operation,
    Parts,
    State,
    closers_of,
    format_bytes,
    format_parts,
    total_bytes,
)
from pytest_sway.spec import Key, ModelSpec, SpecLike, parse_spec, resolved_key, with_adapter
from pytest_sway.stats import SwayStats

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_log = logging.getLogger(__name__)

_GLANCE: Final = 1.0
"""Seconds after which who waits looks again for what nobody announces: a lease that was dropped, not released."""


@dataclass(frozen=True, slots=True)
class CachedBackend:
    """A backend in the cache.

    Attributes:
        key: Its identity, `pytest_sway.spec.cache_key_for`.
        backend: What the build returned.
        model_spec: The spec it was loaded from, with device and dtype resolved.
        load_seconds: How long the load took, its base included where that was loaded too.
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

    __slots__ = ("__weakref__", "_cache", "_claim", "_entry", "cached")

    def __init__(self, cache: BackendCache, entry: Entry, claim: Claim, cached: CachedBackend) -> None:
        self._cache = cache
        self._entry = entry
        self.cached = cached
        self._claim = claim  # last: a lease that an interrupt left half made has none

    @property
    def backend(self) -> Any:
        """The leased backend."""
        return self.cached.backend

    def release(self) -> None:
        """Give the claim up. Again, or from another thread, is harmless."""
        self._cache._release(self._entry, self._claim)

    def __enter__(self) -> Any:
        return self.backend

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        # A collection can come at any moment, also under the lock: so only leave a note, for the next step to read.
        if hasattr(self, "_claim") and self._claim in self._entry.claims:
            self._cache._dropped.append((self._entry, self._claim))


@final
class BackendCache:
    """At most ``max_size`` live backends, loaded once each, leased while in use, closed when evicted.

    Thread-safe, and local to its process.

    Args:
        max_size: The most backends that are loading, ready or closing at one time; at least 1.
        max_bytes: The most bytes of weights that are resident at one time; ``None`` for no bound.
        build: What makes a backend of a spec; an `InformedBuild` is asked more. By default the backends of this
            package, with bases shared among the adapters of this cache.
        named: Specs that may be asked for by name.
        listener: Who is told of loads and closes.
        who: Names whoever asks without a name of his own; by default by the calling thread.
        remedy: What to do when there is no room, at the end of a sentence.
        lease_timeout: Seconds that a request waits for others to release what keeps it from being loaded.

    Attributes:
        stats: What happened so far.

    Raises:
        ValueError: ``max_size`` or ``max_bytes`` is less than 1.
    """

    def __init__(
        self,
        max_size: int = 2,
        *,
        max_bytes: int | None = None,
        build: Build | None = None,
        named: Mapping[str, Any] = MappingProxyType({}),
        listener: Listener | None = None,
        who: Callable[[], str] = lambda: threading.current_thread().name,
        remedy: str = "raise the size of the cache",
        lease_timeout: float = 300.0,
    ) -> None:
        if isinstance(max_size, bool) or not isinstance(max_size, int) or max_size < 1:
            raise ValueError(f"max_size must be a whole number of at least 1; found {max_size!r}.")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, or None for no bound; found {max_bytes!r}.")
        self._budget: Final = Budget(max_size, max_bytes)
        self._build: Final = informed(build)
        self._named: Final = named
        self._listener: Final = listener or Listener()
        self._who: Final = who
        self._remedy: Final = remedy
        self._lease_timeout: Final = lease_timeout
        self.stats: Final = SwayStats()
        self._start_empty()
        call_in_forked_child(self._start_empty)

    def _start_empty(self) -> None:
        """Begin with nothing: as a new cache does, and as a forked child's must, whose locks nobody will free."""
        self._lock = threading.Lock()
        self._changed = Bell()
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._retired: list[Entry] = []
        self._waiting: dict[threading.Thread, Operation] = {}
        self._dropped: deque[tuple[Entry, Claim]] = deque()
        self._shut = False

    # --- what callers use ---------------------------------------------------------------------------------------------

    @property
    def max_size(self) -> int:
        """The most backends that are resident at one time."""
        return self._budget.max_size

    @property
    def max_bytes(self) -> int | None:
        """The most bytes of weights that are resident at one time, or ``None``."""
        return self._budget.max_bytes

    def resolve(self, spec: SpecLike, *, adapter_path: Path | None = None) -> ModelSpec:
        """Return ``spec`` parsed, with the device and dtype that it is loaded with here.

        Raises:
            SpecError: It is malformed.
        """
        return self._resolve(spec, adapter_path)

    def get_or_load(self, spec: SpecLike, *, adapter_path: Path | None = None) -> CachedBackend:
        """Return the entry of ``spec``, loaded if need be. It is not pinned: a later load may evict it.

        Args:
            spec: What to load, in any form that `pytest_sway.spec.parse_spec` takes.
            adapter_path: An adapter that takes the place of the spec's own, in the key as in the load.

        Raises:
            SwayError: As `acquire`.
        """
        lease = self.acquire(spec, adapter_path=adapter_path)
        try:
            return lease.cached
        finally:
            lease.release()

    @contextmanager
    def lease(self, spec: SpecLike, *, adapter_path: Path | None = None, holder: str | None = None) -> Iterator[Any]:
        """Give the backend of ``spec``, pinned until the block ends.

        Args:
            spec: What to load.
            adapter_path: An adapter that takes the place of the spec's own.
            holder: Who is named to others when the cache is full.

        Raises:
            SwayError: As `acquire`.
        """
        with self.acquire(spec, adapter_path=adapter_path, holder=holder) as backend:
            yield backend

    def acquire(self, spec: SpecLike, *, adapter_path: Path | None = None, holder: str | None = None) -> Lease:
        """Return a lease on the backend of ``spec``, which is loaded if need be.

        Args:
            spec: What to load.
            adapter_path: An adapter that takes the place of the spec's own.
            holder: Who is named to others when the cache is full; by default as the cache's ``who`` says.

        Raises:
            SpecError: The spec is malformed.
            CacheFullError: No room can be made.
            CacheDeadlockError: The load waits for itself.
            CacheClosedError: The cache was shut down.
            SwayError: The load failed; errors of other types are wrapped in a `BackendLoadError`.
        """
        resolved = self._resolve(spec, adapter_path)
        operation = Operation(holder or self._who())
        try:
            try:
                lease = self._serve(operation, resolved, resolved_key(resolved))
                self._listener.leased(lease.cached)
                return lease
            except BaseException:
                self._abandon(operation)
                raise
        except BaseException:
            self._abandon(operation)  # an interrupt may have struck in the handler above
            raise

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

    def retire(self, cached: CachedBackend) -> None:
        """Hand ``cached`` out to nobody new, and close it: now if it is idle, else after its last lease."""
        self._close_each(lambda operation: self._retire(operation, lambda entry: entry.cached is cached))

    def evict_all(self) -> None:
        """Close everything: what is idle now, what is leased after its last lease. Loads under way go on."""
        self._close_each(lambda operation: self._retire(operation, lambda entry: entry.state is State.READY))

    def shutdown(self, timeout: float | None = None) -> list[str]:
        """Close everything for good, waiting for loads and closes under way; later requests get `CacheClosedError`.

        Args:
            timeout: Seconds to wait for them; by default as long as for leases. What is still loading then is closed
                by its own thread when it is done.

        Returns:
            The holders of leases that were still open; their backends were closed all the same.
        """
        try:
            self._refuse_from_now_on()
            deadline = time.monotonic() + (self._lease_timeout if timeout is None else timeout)
            while time.monotonic() < deadline and (bell := self._under_way()) is not None:
                self._wait(bell, min(_GLANCE, max(0.0, deadline - time.monotonic())))
            return self._revoke_leases()
        finally:
            self._close_each(self._take_idle)

    # --- one request --------------------------------------------------------------------------------------------------

    def _resolve(self, spec: SpecLike, adapter_path: Path | None) -> ModelSpec:
        return self._build.resolve(with_adapter(parse_spec(spec, named=self._named), adapter_path))

    def _serve(self, operation: Operation, spec: ModelSpec, key: Key) -> Lease:
        lease = self._claim(operation, spec, key)
        return lease if lease is not None else self._load(operation, spec)

    def _claim(self, operation: Operation, spec: ModelSpec, key: Key) -> Lease | None:
        try:
            while isinstance(claimed := self._try_to_claim(operation, spec, key), Bell):
                self._wait(claimed, _GLANCE)
            return claimed
        finally:
            if operation.waits_for is not None:
                self._stop_waiting(operation)

    def _load(self, operation: Operation, spec: ModelSpec) -> Lease:
        """Load what this operation leads; the lease is its own, those who waited have theirs."""
        try:
            self._build.check(spec)
            estimate = self._build.estimate(spec)
            self._refuse_if_over_budget(spec, estimate)
            with self._build.hold(spec):
                self._make_room(operation, estimate)
                with self._listener.loading(spec):
                    seconds = self._build_in_memory(operation, spec, estimate)
            lease = self._admit(operation, seconds, self._build.measure(operation.built[0]))
        except Exception as error:
            # Frames that have ended would keep a half-loaded model alive for as long as the error's report lives.
            traceback.clear_frames(error.__traceback__)
            failure = error if isinstance(error, SwayError) else _wrapped(error, spec)
            self._fail(operation, failure)
            if failure is error:
                raise
            raise failure from (error if redact_error(error) else None)
        self._close_victims(operation)
        self._listener.loaded(lease.cached)
        return lease

    def _build_in_memory(self, operation: Operation, spec: ModelSpec, estimate: Parts | None) -> float:
        """Build, and once more without all that is idle if the memory runs out; return the seconds it took."""
        started = time.perf_counter()
        for attempt in (1, 2):
            try:
                operation.built.extend(map(self._build, [spec]))  # in C: nothing comes between build and record
                break
            except Exception as error:
                if not self._build.exhausted(error):
                    raise
                if attempt == 2:
                    raise self._out_of_memory(spec, estimate) from error
                traceback.clear_frames(error.__traceback__)
            self._evict_idle(operation)
            self._close_victims(operation)
        return time.perf_counter() - started

    def _refuse_if_over_budget(self, spec: ModelSpec, parts: Parts | None) -> None:
        if parts is not None and self.max_bytes is not None and sum(parts.values()) > self.max_bytes:
            raise ModelTooLargeError(
                f"{spec} takes {format_bytes(sum(parts.values()))}, more than the whole budget of"
                f" {format_bytes(self.max_bytes)}; nothing was evicted for it. Raise the budget, or ask for a smaller"
                " dtype or model."
            )

    def _make_room(self, operation: Operation, estimate: Parts | None) -> None:
        deadline = time.monotonic() + self._lease_timeout
        while (bell := self._reserve(operation, estimate, deadline)) is not None:
            if operation.victims:
                self._close_victims(operation)
            else:
                self._wait(bell, min(_GLANCE, max(0.0, deadline - time.monotonic())))

    def _close_victims(self, operation: Operation) -> None:
        while operation.victims:
            self._close(operation, operation.victims[0])

    def _close_each(self, take: Callable[[Operation], None]) -> None:
        """Close what ``take`` puts among the victims of an operation, whatever some of the closes raise."""
        operation = Operation(self._who())
        try:
            try:
                take(operation)
                self._close_victims(operation)
            except BaseException:
                self._abandon(operation)
                raise
        except BaseException:
            self._abandon(operation)
            raise

    def _close(self, operation: Operation, entry: Entry) -> None:
        """Close a CLOSING entry; the only place where a backend's ``close()`` is called."""
        try:
            while entry.closers:
                entry.closers.pop()()
        except Exception as raised:
            self._note_close_error(f"closing {entry.spec} failed", raised)
        finally:
            cached = self._forget(operation, entry)
        if cached is not None:
            self._listener.evicted(cached)

    def _note_close_error(self, what: str, error: Exception) -> None:
        _log.warning(what, exc_info=error if redact_error(error) else None)
        self.stats.close_errors.append(f"{what}: {type(error).__name__}: {redacted(str(error))}")

    def _release(self, entry: Entry, claim: Claim) -> None:
        self._close_each(lambda operation: self._unclaim(operation, entry, claim))

    # --- the steps: each is atomic, and can be repeated ---------------------------------------------------------------

    @atomic
    def _try_to_claim(self, operation: Operation, spec: ModelSpec, key: Key) -> Lease | Bell | None:
        """Lease what is ready, wait for what is loading, or (``None``) lead the load of what is neither."""
        self._collect_dropped()
        if operation.lease is not None:
            return operation.lease
        if operation.error is not None:
            raise operation.error
        if self._shut:
            raise CacheClosedError(f"the cache was shut down; {spec} cannot be had from it any more.")
        entry = self._entries.get(key)
        if entry is None:
            operation.entry = self._entries[key] = Entry(key, spec, operation)
            return None
        if entry.state is State.READY:
            self._entries.move_to_end(key)
            self.stats.backend(str(spec)).hits += 1
            return self._grant(entry, operation)
        if entry.state is not State.CLOSING:
            self._join(operation, entry)
        elif entry.closing_thread is operation.thread:
            raise CacheDeadlockError(f"the close of {spec} asks for {spec}; it would wait forever.")
        return self._changed

    @atomic
    def _stop_waiting(self, operation: Operation) -> None:
        self._waiting.pop(operation.thread, None)
        operation.error = None

    @atomic
    def _reserve(self, operation: Operation, estimate: Parts | None, deadline: float) -> Bell | None:
        """Take room for the operation's entry, which is LOADING from then on; or, to come again, victims to close.

        Returns:
            ``None`` if there is room; else what to wait for, unless there are victims to close.
        """
        newcomer = cast("Entry", operation.entry)
        newcomer.parts = estimate
        self._collect_dropped()
        if self._shut:
            raise CacheClosedError(f"the cache was shut down before {newcomer.spec} was loaded.")
        victims = self._budget.victims(self._residents(), newcomer)
        if victims == []:
            newcomer.state = State.LOADING
            self._note_peaks()
            return None
        if victims is not None:
            self._evict(operation, victims)
            return self._changed
        if self._never_fits(newcomer, {operation.thread}):
            raise self._full(newcomer, "all of it is in use by the one who asks")
        queue = self._queue_behind(operation)
        if self._never_fits(newcomer, {operation.thread, *(behind.thread for behind in queue)}):
            error = self._full(newcomer, "all of it is in use by those who wait for it")
            self._refuse((behind for behind in queue if self._never_all_ends(behind.thread)), error)
        if time.monotonic() >= deadline:
            error = self._full(newcomer, f"none of it came free within {self._lease_timeout:g} s")
            self._refuse(list(newcomer.waiters), error)
            raise error
        return self._changed

    @atomic
    def _admit(self, operation: Operation, seconds: float, parts: Parts | None) -> Lease:
        """Make the loaded entry READY and grant all who waited their leases, in one step."""
        entry = cast("Entry", operation.entry)
        if self._shut:
            raise CacheClosedError(f"the cache was shut down while {entry.spec} was loading.")
        entry.parts = parts if parts is not None else entry.parts
        size = total_bytes([entry])
        if size is not None and self.max_bytes is not None and size > self.max_bytes:
            raise ModelTooLargeError(
                f"{entry.spec} turned out to take {format_bytes(size)}, more than the whole budget of"
                f" {format_bytes(self.max_bytes)}. Raise the budget, or ask for a smaller dtype or model."
            )
        entry.closers[:] = closers_of(operation.built)
        entry.cached = CachedBackend(entry.key, operation.built[0], entry.spec, seconds)
        entry.state = State.READY
        operation.built.clear()
        operation.lease = self._grant(entry, operation)
        stats = self.stats.backend(str(entry.spec))
        for waiter in entry.waiters:
            waiter.lease = self._grant(entry, waiter)
            stats.hits += 1
        self._dismiss_waiters(entry)
        entry.leader = None  # else the leader's lease would live as long as the entry
        self._entries.move_to_end(entry.key)
        stats.loads += 1
        stats.load_seconds += seconds
        self._note_peaks()
        self._evict(operation, self._budget.surplus(self._residents(), entry))
        self._announce()
        return operation.lease

    @atomic
    def _fail(self, operation: Operation, error: SwayError) -> None:
        """Give those who waited for a load its error; who waited for one that never began may try it themselves."""
        entry = cast("Entry", operation.entry)
        if entry.state is not State.LOADING:
            return
        self._refuse(list(entry.waiters), error)
        self.stats.backend(str(entry.spec)).failures += 1

    @atomic
    def _retire(self, operation: Operation, chosen: Callable[[Entry], bool]) -> None:
        """Take the chosen entries out of the map; what is idle of them is the operation's to close."""
        leaving = [entry for entry in self._entries.values() if entry.claims and chosen(entry)]
        staying = [entry for entry in self._entries.values() if entry not in leaving]
        # In one assignment, which an interrupt cannot split.
        self._retired, self._entries = [*self._retired, *leaving], OrderedDict((entry.key, entry) for entry in staying)
        self._take(operation, [entry for entry in self._residents() if entry.idle and chosen(entry)])
        self._announce()

    @atomic
    def _unclaim(self, operation: Operation, entry: Entry, claim: Claim) -> None:
        self._collect_dropped()
        entry.claims.discard(claim)
        self._take(operation, [entry for entry in self._retired if entry.idle])
        self._announce()

    @atomic
    def _forget(self, operation: Operation, entry: Entry) -> CachedBackend | None:
        """Let go of an entry whose close has been called; return what was in it, the first time."""
        if entry.closers:  # an interrupt came before the close: the entry lives on
            return None
        self._detach(entry)
        self._announce()
        cached, entry.cached = entry.cached, None
        if entry in operation.victims:
            operation.victims.remove(entry)
        return cached

    @atomic
    def _refuse_from_now_on(self) -> None:
        self._shut = True
        self._announce()

    @atomic
    def _under_way(self) -> Bell | None:
        """What to wait for while other threads load or close."""
        me = threading.current_thread()
        entries = (*self._retired, *self._entries.values())
        under_way = any(entry.state is not State.READY and entry.ends_without({me}) for entry in entries)
        return self._changed if under_way else None

    @atomic
    def _revoke_leases(self) -> list[str]:
        self._collect_dropped()
        holders = [claim.holder for entry in self._residents() for claim in entry.claims]
        for entry in self._residents():
            entry.claims.clear()
        return holders

    @atomic
    def _evict_idle(self, operation: Operation) -> None:
        self._evict(operation, [entry for entry in self._residents() if entry.idle])

    @atomic
    def _take_idle(self, operation: Operation) -> None:
        self._take(operation, [entry for entry in self._residents() if entry.idle])

    def _abandon(self, operation: Operation) -> None:
        """Give back all that an operation has taken, after an error or an interrupt."""
        entry = operation.entry
        if entry is not None and entry.state is State.LOADING:
            if operation.built:
                entry.closers[:] = closers_of(operation.built)
                operation.built.clear()
            try:
                while entry.closers:
                    entry.closers.pop()()
            except Exception as raised:
                self._note_close_error(f"closing {entry.spec}, which was never handed out, failed", raised)
        self._undo(operation)

    @atomic
    def _undo(self, operation: Operation) -> None:
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

    def _wait(self, bell: Bell, timeout: float) -> None:
        bell.wait(timeout)

    # --- parts of steps, under the lock -------------------------------------------------------------------------------

    def _residents(self) -> list[Entry]:
        """What counts towards the cap, least recently used first; what is retired before all else."""
        return [entry for entry in (*self._retired, *self._entries.values()) if entry.state in RESIDENT]

    def _announce(self) -> None:
        """Wake all who wait, to look again."""
        bell, self._changed = self._changed, Bell()
        bell.ring()

    def _grant(self, entry: Entry, operation: Operation) -> Lease:
        claim = Claim(operation.holder, operation.thread)
        lease = Lease(self, entry, claim, cast("CachedBackend", entry.cached))
        entry.claims.add(claim)
        return lease

    def _join(self, operation: Operation, entry: Entry) -> None:
        """Wait for the load of another, unless that waits for us."""
        if operation.waits_for is entry:
            return
        if any(leader.thread is operation.thread for leader in self._leaders(entry)):
            raise CacheDeadlockError(
                f"the load of {entry.spec} asks, while it is loading, for itself; it would wait forever. A build"
                " may ask the cache for other specs, not for the one that it builds."
            )
        operation.waits_for = entry
        self._waiting[operation.thread] = operation
        entry.waiters.append(operation)
        if entry.state is State.QUEUED:
            self._announce()  # its leader may wait for room that we hold

    def _leaders(self, entry: Entry | None) -> Iterator[Operation]:
        """Who loads ``entry``, who loads what that one waits for, and so on."""
        while entry is not None and entry.leader is not None:
            yield entry.leader
            waiting = self._waiting.get(entry.leader.thread)
            entry = None if waiting is None else waiting.waits_for

    def _queue_behind(self, operation: Operation) -> list[Operation]:
        """Who waits, also through others, for what this operation loads."""
        return [
            waiting
            for waiting in self._waiting.values()
            if any(leader.thread is operation.thread for leader in self._leaders(waiting.waits_for))
        ]

    def _never_fits(self, newcomer: Entry, threads: Collection[threading.Thread]) -> bool:
        """Whether there is no room even when all has ended that can end without these threads."""
        return not self._budget.allows([*(e for e in self._residents() if not e.ends_without(threads)), newcomer])

    def _never_all_ends(self, thread: threading.Thread) -> bool:
        """Whether this thread keeps something resident."""
        return not all(entry.ends_without({thread}) for entry in self._residents())

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
            self.stats.backend(str(victim.spec)).evictions += 1
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
        while self._dropped:
            entry, claim = self._dropped[0]
            entry.claims.discard(claim)
            self._dropped.popleft()

    def _note_peaks(self) -> None:
        residents = self._residents()
        self.stats.peak_resident = max(self.stats.peak_resident, len(residents))
        self.stats.peak_bytes = max(self.stats.peak_bytes, total_bytes(e for e in residents if e.parts) or 0)

    @atomic
    def _out_of_memory(self, spec: ModelSpec, estimate: Parts | None) -> CacheFullError:
        others = [entry for entry in self._residents() if entry.state is not State.LOADING]
        names = "; ".join(f"{entry.spec}, {format_parts(entry.parts)} ({entry.occupation})" for entry in others)
        return CacheFullError(
            f"the memory of {spec.device} ran out twice while {spec} was loaded, which takes {format_parts(estimate)};"
            f" all that was idle was closed before the second try, and {names or 'nothing'} stays loaded."
            " Ask for a smaller dtype or model, or release what is in use."
        )

    def _full(self, newcomer: Entry, why: str) -> CacheFullError:
        residents = self._residents()
        names = "; ".join(f"{entry.spec} ({entry.occupation})" for entry in residents)
        bound = f"{len(residents)} of at most {self.max_size} backends"
        if self.max_bytes is not None:
            size = total_bytes(residents)
            known = "an unknown number of bytes" if size is None else format_bytes(size)
            bound += f" with {known} of at most {format_bytes(self.max_bytes)}"
        return CacheFullError(
            f"there is no room to load {newcomer.spec}: the cache holds {bound}, and {why}: {names}."
            f" Release one of them first, or {self._remedy}."
        )


def _wrapped(error: Exception, spec: ModelSpec) -> BackendLoadError:
    adapter = "" if spec.adapter is None else f" with adapter {str(spec.adapter)!r}"
    finetuned = "" if spec.finetuned is None else f" with fine-tuned model {spec.finetuned!r}"
    return BackendLoadError(
        f"loading the {spec.kind} backend of base {spec.base!r}{adapter}{finetuned} failed:"
        f" {type(error).__name__}: {redacted(str(error))}"
    )
