"""Four threads in any interleaving (hypothesis); each load and each close stops at a gate."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from functools import partial
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pytest_sway.cache import backend_cache as cache_module
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.entries import Lease
from pytest_sway.errors import BackendLoadError, CacheFullError
from tests.unit.fakes import DEADLINE, FakeBackend, Gate, InformedFakeBuild, spec
from tests.unit.fire.board import Board, Status, Worker, note_waits
from tests.unit.fire.profiles import PROFILE, machine_settings

NAMES = ("a", "a+x", "a+y", "b")
WORKERS = 4


class BoardGate(Gate):
    def __init__(self, board: Board, name: str) -> None:
        super().__init__()
        self._board = board
        self._name = name

    def pass_through(self) -> None:
        self._board.pass_gate(self._name)


class BoardBuild(InformedFakeBuild):
    """A build whose loads and closes stop at a board's gates, and which checks the cache's rules."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self.load_gates = {name: BoardGate(board, f"load {name}") for name in NAMES}
        self.close_gates = {name: BoardGate(board, f"close {name}") for name in NAMES}
        self.lock = threading.Lock()
        self.held: Counter[FakeBackend] = Counter()
        self.loading: Counter[str] = Counter()
        self.broken_rules: list[str] = []

    def __call__(self, asked: Any, *, adapter_path: Any = None) -> Any:
        with self.lock:
            self.loading[asked] += 1
            if self.loading[asked] > 1:
                self.broken_rules.append(f"two loads of {asked} at once")
        try:
            return super().__call__(asked, adapter_path=adapter_path)
        finally:
            with self.lock:
                self.loading[asked] -= 1

    def closing(self, backend: FakeBackend) -> None:
        with self.lock:
            if self.held[backend]:
                self.broken_rules.append(f"{backend.name} is closed while it is leased")
            if backend.closes > 1:
                self.broken_rules.append(f"{backend.name} is closed again")
        super().closing(backend)


class ThreadsMachine(RuleBasedStateMachine):
    @initialize(max_size=st.integers(1, 3))
    def start(self, max_size: int) -> None:
        logging.disable(logging.WARNING)
        self._glance = cache_module._GLANCE
        cache_module._GLANCE = DEADLINE  # type: ignore[misc] # who is not woken stays asleep, and is found
        self.board = Board()
        self.build = BoardBuild(self.board)
        self.cache = BackendCache(max_size, build=self.build, lease_timeout=1000.0)
        note_waits(self.cache, self.board)
        self.workers = [Worker(self.board, f"worker {number}") for number in range(WORKERS)]
        self.helper = Worker(self.board, "helper")
        self.leases: list[Lease] = []
        self.interrupts = 0

    # --- what the workers do ------------------------------------------------------------------------------------------

    def hold(self, name: str) -> None:
        self.keep(self.cache.acquire(spec(name)))

    def keep(self, lease: Lease) -> None:
        with self.build.lock:
            self.build.held[lease.backend] += 1
            self.leases.append(lease)
        lease.backend.use()

    def use(self, name: str) -> None:
        with self.cache.lease(spec(name)) as backend:
            with self.build.lock:
                self.build.held[backend] += 1
            backend.use()
            with self.build.lock:
                self.build.held[backend] -= 1

    def give_back(self, lease: Lease) -> None:
        lease.release()

    # --- what the test chooses ----------------------------------------------------------------------------------------

    def idle_worker(self, number: int) -> Worker | None:
        idle = [worker for worker in self.workers if worker.idle]
        return idle[number % len(idle)] if idle else None

    @rule(number=st.integers(0, 3), name=st.sampled_from(NAMES), keep=st.booleans())
    def request(self, number: int, name: str, keep: bool) -> None:
        worker = self.idle_worker(number)
        if worker is not None:
            worker.do(partial(self.hold if keep else self.use, name))
            self.board.settle()

    @rule(number=st.integers(0, 3))
    def evict_all(self, number: int) -> None:
        worker = self.idle_worker(number)
        if worker is not None:
            worker.do(self.cache.evict_all)
            self.board.settle()

    @rule(number=st.integers(0, 9))
    def retire(self, number: int) -> None:
        if self.leases and self.helper.idle:
            self.helper.do(partial(self.cache.retire, self.leases[number % len(self.leases)].cached))
            self.board.settle()

    @rule(number=st.integers(0, 9), again=st.booleans())
    def release(self, number: int, again: bool) -> None:
        """Release by the helper thread, since the holder may wait for another backend."""
        if self.leases and self.helper.idle:
            lease = self.leases.pop(number % len(self.leases))
            self.build.held[lease.backend] -= 1
            self.helper.do(partial(self.give_back, lease))
            self.board.settle()
            if again and self.helper.idle:
                self.helper.do(lease.release)
                self.board.settle()

    @rule(number=st.integers(0, 9))
    def open_gate(self, number: int) -> None:
        self.board.open_gate(number)
        self.board.settle()

    @rule(name=st.sampled_from(NAMES), error=st.sampled_from([RuntimeError, KeyboardInterrupt]))
    def set_load_error(self, name: str, error: type[BaseException]) -> None:
        self.build.load_errors[name] = [error("a fault")]

    @rule(name=st.sampled_from(NAMES), error=st.sampled_from([RuntimeError, KeyboardInterrupt]))
    def set_close_error(self, name: str, error: type[BaseException]) -> None:
        self.build.close_errors[name] = [error("a fault")]

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def rules_are_kept(self) -> None:
        assert not self.build.broken_rules
        assert self.build.oracle.peak <= self.cache.max_size
        for lease in self.leases:
            lease.backend.use()
        for worker in (*self.workers, self.helper):
            while worker.errors:
                error = worker.errors.pop()
                assert isinstance(error, BackendLoadError | CacheFullError | KeyboardInterrupt), repr(error)

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """A thread that waits while nothing loads or closes must wait for leased room."""
        if self.board.count(Status.WAITING) and not self.board.count(Status.AT_GATE):
            leased = {lease.backend for lease in self.leases}
            assert len(leased) == self.cache.max_size, self.board.status

    def teardown(self) -> None:
        try:
            self.board.open_all()
            self.board.settle()
            while self.leases:
                self.helper.do(self.leases.pop().release)
                self.board.settle()
            for worker in (*self.workers, self.helper):
                assert worker.idle, self.board.status
                worker.stop()
            for errors in (*self.build.load_errors.values(), *self.build.close_errors.values()):
                errors.clear()
            self.cache.shutdown()
            assert all(backend.closes == 1 for backend in self.build.built)
            assert self.build.oracle.live == 0
            assert self.build.base_loads == self.build.base_closes
            assert not self.cache._ledger._entries
        finally:
            cache_module._GLANCE = self._glance  # type: ignore[misc]
            logging.disable(logging.NOTSET)


TestThreads = ThreadsMachine.TestCase
TestThreads.settings = machine_settings(PROFILE.threads)
