"""`BackendCache`: an LRU cache of live backends that are leased, evicted and closed.

Its invariants, each with a test of its number:

 1. Per key at most one load runs at a time, and all its waiters get the same object.
 2. ``close()`` never starts while the entry is leased.
 3. Each loaded backend is closed at most once, and exactly once after `BackendCache.shutdown`. A ``close()`` that an
    interrupt ended is called again if it can finish what it has left, see `pytest_sway.backends.contract.closes_again`.
 4. loading + ready + closing <= max_size, always: room is made before the load.
 5. Becoming READY and granting leases to the waiters is one atomic step.
 6. A CLOSING entry is never handed out; a request for it waits, then gets a new one.
 7. The victim is the least recently used idle entry.
 8. A late completion, release or eviction of one generation never touches the next.
 9. A failed load is not cached: leader and waiters get the error, and the next call tries again.
10. An interrupted load undoes its reservation; the interrupt propagates, and a waiter takes over.
11. A ``close()`` that raises fails no other request.
12. Backends without ``close()`` are dropped.
13. When nothing is in flight, no waiter or error is left, and none keeps a backend alive.
14. A load that waits for itself, even through other threads, raises an error instead of a deadlock.
15. A lease may be released twice, from any thread.
16. A base is loaded once, closed after its last adapter, and its bytes count once.
17. If the requester itself holds every lease, `CacheFullError` is raised at once; else at the deadline. A lease that a
    test keeps to its end is held by all its threads. An ended thread's lease is held by the main thread. When an
    `Owner` ends, its leases end, and it gets no more.
18. With a byte budget, sizes are estimated before the load; an unknown size counts as the whole budget.
19. After a fork the child's cache is empty and closes none of the parent's backends.
20. `BackendCache.evict_all` closes every idle entry even if some raise, and can be called twice.

A request: `acquire` opens an `Operation`, the record of what it has taken. Only the atomic steps of the `Ledger` change
entries. Between them, outside the lock, this module loads backends and the `Closer` closes them. After an error,
`Closer.abandon` gives back all that the operation's record names.

An interrupt may come at any line, and the run goes on after it: pytest-timeout's signal method calls ``pytest.fail`` in
its handler, which raises no `Exception`. So each step is atomic and may be repeated. A second interrupt during the
cleanup of a first, within microseconds, can leave a slot taken until the session ends.
"""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, final

from pytest_sway.cache import messages
from pytest_sway.cache.budget import Budget
from pytest_sway.cache.builds import Listener, informed
from pytest_sway.cache.closing import Closer
from pytest_sway.cache.entries import CachedBackend, Claim, Entry, Lease, Operation, SizeByPart, State
from pytest_sway.cache.ledger import Ledger
from pytest_sway.cache.owners import Owner
from pytest_sway.cache.stats import SwayStats
from pytest_sway.errors import FilesChangedError, SwayError, ends_run
from pytest_sway.spec.identity import Key, resolved_key, state_of_files, with_adapter
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.parsing import SpecLike, parse_spec
from pytest_sway.system.imports import import_seconds
from pytest_sway.system.locking import OneShotEvent
from pytest_sway.system.redaction import without_secrets

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.backends.checkpoints.plan import Plan


__tracebackhide__ = True

_TRIES: Final = 3
"""How often a load is tried if its files keep changing."""

_GLANCE: Final = 1.0
"""Seconds between a waiter's looks for a lease that was dropped without a release, which nobody announces."""


@final
class BackendCache:
    """An LRU cache of at most ``max_size`` live backends, which are leased while in use and closed when evicted.

    It is thread-safe, and local to its process.

    Args:
        max_size: The most backends that are loading, ready or closing at one time; at least 1.
        max_bytes: The most bytes of weights that are resident at one time; ``None`` for no bound.
        build: Builds a backend from a spec: any ``build(spec, *, adapter_path=None)``, or a `Build`. The default builds
            all kinds of this package, and adapters in this cache share their bases.
        named: Specs by name.
        listener: Is told of loads and closes.
        owner: Returns the owner of a lease that the calling thread requests. The default owner is named after the
            thread; only a release ends its leases.
        remedy: Advice that ends the message of a `CacheFullError`.
        lease_timeout: Seconds that a request waits for others to release their leases.

    Attributes:
        stats: The counts so far.

    Raises:
        ValueError: ``max_size`` or ``max_bytes`` is less than 1.
    """

    def __init__(
        self,
        max_size: int = 2,
        *,
        max_bytes: int | None = None,
        build: Callable[..., Any] | None = None,
        named: Mapping[str, Any] = MappingProxyType({}),
        listener: Listener | None = None,
        owner: Callable[[], Owner] = lambda: Owner(threading.current_thread().name),
        remedy: str = "raise the size of the cache",
        lease_timeout: float = 300.0,
    ) -> None:
        if isinstance(max_size, bool) or not isinstance(max_size, int) or max_size < 1:
            raise ValueError(f"max_size must be a whole number of at least 1; found {max_size!r}.")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, or None for no bound; found {max_bytes!r}.")
        self.stats: Final = SwayStats()
        self._budget: Final = Budget(max_size, max_bytes)
        self._ledger: Final = Ledger(self._budget, self.stats, remedy, self._release)
        self._build: Final = informed(build)
        self._named: Final = named
        self._listener: Final = listener or Listener()
        self._closer: Final = Closer(self._ledger, self._listener, self.stats)
        self._owner: Final = owner
        self._lease_timeout: Final = lease_timeout

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
        """Parse ``spec``, and replace ``auto`` by the device and dtype in use here.

        Raises:
            SpecError: The spec is malformed.
        """
        try:
            return self._build.resolve(with_adapter(parse_spec(spec, named=self._named), adapter_path))
        except Exception as error:
            without_secrets(error)  # a field may contain one
            raise

    def get_or_load(self, spec: SpecLike, *, adapter_path: Path | None = None) -> CachedBackend:
        """Return the backend of ``spec``, loading it if needed. It is not pinned: a later load may evict it.

        Args:
            spec: A spec, in any form that `pytest_sway.spec.parsing.parse_spec` takes.
            adapter_path: Replaces the spec's adapter.

        Raises:
            SwayError: As `acquire`.
        """
        resolved, owner = self.resolve(spec, adapter_path=adapter_path), self._owner()
        cached = self._ledger.use(resolved, resolved_key(resolved), owner)
        if cached is not None:
            self._listener.leased(cached, owner)
            return cached
        lease = self.acquire(resolved)
        try:
            return lease.cached
        finally:
            lease.release()

    def lease(self, spec: SpecLike, *, adapter_path: Path | None = None, holder: str | None = None) -> Lease:
        """Return a lease for a ``with`` block, to which it gives the backend of ``spec``.

        The backend is loaded and pinned at once, until the block ends, or the test or fixture that took the lease.

        Args:
            spec: The spec to load.
            adapter_path: Replaces the spec's adapter.
            holder: The name that messages show when the cache is full.

        Raises:
            SwayError: As `acquire`.
        """
        return self.acquire(spec, adapter_path=adapter_path, holder=holder)

    def acquire(
        self,
        spec: SpecLike,
        *,
        adapter_path: Path | None = None,
        holder: str | None = None,
        owner: Owner | None = None,
    ) -> Lease:
        """Return a lease on the backend of ``spec``, loading it if needed.

        Args:
            spec: The spec to load.
            adapter_path: Replaces the spec's adapter.
            holder: The name that messages show when the cache is full; by default the owner's.
            owner: The owner with which the lease ends at the latest; by default, the cache's ``owner()``.

        Raises:
            SpecError: The spec is malformed.
            CacheFullError: No room can be made.
            CacheDeadlockError: The load waits for itself.
            CacheClosedError: The cache was shut down.
            BackendUseError: The owner has ended.
            SwayError: The load failed; errors of other types are wrapped in a `BackendLoadError`.
        """
        resolved = self.resolve(spec, adapter_path=adapter_path)
        owner = owner or self._owner()
        for tries_left in reversed(range(_TRIES)):
            try:
                return self._acquire(resolved, holder or owner.name, owner)
            except FilesChangedError:  # the next try reads them anew, under another key
                if not tries_left:
                    raise
        raise AssertionError("the last try returned or raised")

    def _acquire(self, resolved: ModelSpec, holder: str, owner: Owner) -> Lease:
        operation = Operation(holder, owner)
        try:
            lease = self._claim(operation, resolved, resolved_key(resolved)) or self._load(operation, resolved)
            if owner.over:  # it may have ended before the lease was granted
                raise messages.ended(resolved, owner.name)
            self._listener.leased(lease.cached, owner)
            return lease
        except BaseException as error:
            self._closer.abandon(operation)
            without_secrets(error)  # in place, since an interrupt must propagate as the same object
            raise

    def end(self, owner: Owner) -> None:
        """End all leases of an owner and refuse it new ones, also from loads in progress.

        Its backends may be closed from then on, and raise `pytest_sway.errors.BackendClosedError`.
        """
        self._closer.close_each(lambda operation: self._ledger.unclaim_all(operation, owner))

    def loaded_keys(self) -> list[Key]:
        """Return the keys of all ready backends, most recently used last."""
        return [cached.key for cached in self._ledger.ready()]

    def loaded_specs(self) -> list[ModelSpec]:
        """Return the specs of all ready backends, most recently used last."""
        return [cached.model_spec for cached in self._ledger.ready()]

    def leased(self) -> list[CachedBackend]:
        """Return the leased backends, without retired ones."""
        return self._ledger.leased()

    def ready(self) -> list[CachedBackend]:
        """Return the ready backends, leased or idle, most recently used last, without retired ones."""
        return self._ledger.ready()

    def owners_of(self, cached: CachedBackend) -> set[Owner]:
        """Return the owners of a backend's leases, also of a retired one."""
        return self._ledger.owners_of(cached)

    def note_hits(self) -> None:
        """Put the hits since this was last called into the log of what happened when."""
        self._ledger.note_hits()

    def retire(self, cached: CachedBackend) -> None:
        """Stop handing out ``cached``, and close it: now if it is idle, else after its last lease."""
        self._closer.close_each(lambda operation: self._ledger.retire(operation, lambda entry: entry.cached is cached))

    def evict_all(self) -> None:
        """Close every ready backend: now if it is idle, else after its last lease. Loads in progress go on."""
        self._closer.close_each(
            lambda operation: self._ledger.retire(operation, lambda entry: entry.state is State.READY)
        )

    def shutdown(self, timeout: float | None = None) -> list[str]:
        """Close everything for good; later requests raise `CacheClosedError`.

        Args:
            timeout: Seconds to wait for loads and closes in progress; ``lease_timeout`` by default. A load that takes
                longer is closed by its own thread when it ends.

        Returns:
            The holders of open leases. Their backends are closed too.
        """
        try:
            self._ledger.refuse_from_now_on()
            deadline = time.monotonic() + (self._lease_timeout if timeout is None else timeout)
            while time.monotonic() < deadline and (event := self._ledger.under_way()) is not None:
                self._wait(event, min(_GLANCE, max(0.0, deadline - time.monotonic())))
            return self._ledger.revoke_leases()
        finally:
            self._closer.close_each(self._ledger.take_idle)

    # --- one request --------------------------------------------------------------------------------------------------

    def _claim(self, operation: Operation, spec: ModelSpec, key: Key) -> Lease | None:
        try:
            while isinstance(claimed := self._ledger.try_to_claim(operation, spec, key), OneShotEvent):
                self._wait(claimed, _GLANCE)
            return claimed
        finally:
            if operation.waits_for is not None:
                self._ledger.stop_waiting(operation)

    def _load(self, operation: Operation, spec: ModelSpec) -> Lease:
        """Load the operation's entry and return the operation's lease; waiters are granted theirs."""
        try:
            plan = self._checked(operation, spec)
            self._refuse_if_over_budget(plan)
            with self._build.pin(plan):
                self._make_room(operation, plan.sizes)
                with self._listener.loading(spec):
                    seconds = self._build_in_memory(operation, plan)
            if state_of_files(spec) != plan.state:
                raise messages.files_changed(spec)
            lease = self._ledger.admit(operation, seconds, self._build.measure(operation.built[0]))
        except Exception as error:
            # The ended frames would keep a half-loaded model alive as long as the error's report.
            traceback.clear_frames(error.__traceback__)
            shown = without_secrets(error)
            failure = shown if isinstance(shown, SwayError) else messages.load_failed(shown, spec)
            self._ledger.fail(operation, failure)
            if failure is error or ends_run(error):
                raise
            raise failure from shown
        self._closer.close_victims(operation)
        self._listener.loaded(lease.cached)
        return lease

    def _build_in_memory(self, operation: Operation, plan: Plan) -> float:
        """Build; if memory runs out, close all idle backends and build again. Return the seconds without imports."""
        started = time.perf_counter() - import_seconds()
        for attempt in (1, 2):
            try:
                operation.built.extend(map(self._build.build, [plan]))  # in C, so no interrupt can lose the backend
                break
            except Exception as error:
                if not self._build.exhausted(error):
                    raise
                if attempt == 2:
                    raise messages.out_of_memory(plan.spec, plan.sizes, self._ledger.residents()) from error
                traceback.clear_frames(error.__traceback__)
            gc.collect()  # quantized weights and their layers refer to each other
            self._ledger.evict_idle(operation)
            self._closer.close_victims(operation)
        return max(0.0, time.perf_counter() - import_seconds() - started)

    def _checked(self, operation: Operation, spec: ModelSpec) -> Plan:
        """Return the plan of a load; raise `FilesChangedError` if the files have changed since the request.

        A failed check looks at the files again too, since they may have been half written.
        """
        try:
            plan = self._build.check(spec)
        except SwayError:
            self._require_key(operation, spec, resolved_key(spec))
            raise
        self._require_key(operation, spec, plan.key)
        return plan

    def _require_key(self, operation: Operation, spec: ModelSpec, key: Key) -> None:
        if operation.entry is not None and key != operation.entry.key:
            raise messages.files_changed(spec)

    def _refuse_if_over_budget(self, plan: Plan) -> None:
        nbytes = None if plan.sizes is None else sum(plan.sizes.values())
        if nbytes is not None and self.max_bytes is not None and nbytes > self.max_bytes:
            raise messages.too_large(plan.spec, nbytes, self.max_bytes)

    def _make_room(self, operation: Operation, estimate: SizeByPart | None) -> None:
        since, patience = time.monotonic(), self._lease_timeout
        while (event := self._ledger.reserve(operation, estimate, since, patience)) is not None:
            if operation.victims:
                self._closer.close_victims(operation)
            else:
                self._wait(event, min(_GLANCE, max(0.0, since + patience - time.monotonic())))

    def _release(self, entry: Entry, claim: Claim) -> None:
        if self._ledger.unclaim(entry, claim):
            self._closer.close_each(self._ledger.take_retired)

    def _wait(self, event: OneShotEvent, timeout: float) -> None:  # a method, so that tests can replace it
        event.wait(timeout)
