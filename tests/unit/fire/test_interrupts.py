"""A KeyboardInterrupt at every line of the cache in turn: after each, nothing is lost and the next request works.

Lines that handle an error are excluded, since the cache promises nothing about two faults within microseconds.

The last line of a ``with`` statement is traced too, although no real interrupt can come before its exit.
`Lease.__del__` is excluded, since Python ignores errors in a finaliser.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import pytest

from pytest_sway.backends.local import pool
from pytest_sway.cache import backend_cache as cache_module
from pytest_sway.cache import budget, closing, entries, ledger
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.entries import Lease
from pytest_sway.cache.owners import Owner
from pytest_sway.errors import SwayError
from pytest_sway.system import locking
from tests.unit.fakes import Call, InformedFakeBuild, SharingBackend, Watched, spec

CACHE_FILES = frozenset({module.__file__ for module in (cache_module, closing, ledger, entries, budget)})
POOL_FILES = frozenset({pool.__file__})


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that this thread runs in the given files."""

    def __init__(self, files: frozenset[str | None], strike_at: int) -> None:
        self._files = files
        self._strike_at = strike_at
        self.lines = 0
        self.where = ""

    def __enter__(self) -> Interrupter:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        return self._line if code.co_filename in self._files and code.co_name != "__del__" else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self._strike(frame)
        return self._line

    def _strike(self, frame: FrameType) -> None:
        if sys.exc_info()[0] is None:
            self.lines += 1
            if self.lines == self._strike_at:
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise KeyboardInterrupt(self.where)


class Scenario:
    """An operation on a cache of its own; only `act` is interrupted."""

    max_size = 2
    max_bytes: int | None = None
    expected: tuple[type[BaseException], ...] = ()

    def __init__(self) -> None:
        self.build = InformedFakeBuild()
        self.cache = BackendCache(self.max_size, max_bytes=self.max_bytes, build=self.build)
        self.watched = Watched(self.cache)
        self.held: list[Lease] = []
        self.calls: list[Call[Any]] = []
        self.arrange()

    def arrange(self) -> None: ...

    def act(self) -> None:
        raise NotImplementedError

    def use(self, name: str) -> None:
        with self.cache.lease(spec(name)) as backend:
            assert backend.use() == name

    def use_all(self) -> None:
        for name in ("a", "a+x", "b", "c", "a"):
            self.use(name)

    def verify(self) -> None:
        for gate in (*self.build.load_gates.values(), *self.build.close_gates.values()):
            gate.open()
        self.build.inside.clear()
        self.build.inside_close.clear()
        for call in self.calls:
            call.result()
        for lease in self.held:
            lease.release()
        del self.calls, self.held
        gc.collect()
        assert not self.cache.leased(), "a lease is left"
        if not self.cache._ledger._shut:
            self.build.load_errors.clear()
            self.build.measure_errors.clear()
            Call[None](self.use_all).result()
        self.cache.shutdown()
        closes = [backend.closes for backend in self.build.built]
        assert closes == [1] * len(closes), "not closed exactly once"
        assert self.build.oracle.live == 0
        assert self.build.oracle.peak <= self.max_size, "more resident than the cap"
        assert self.build.base_loads == self.build.base_closes
        assert not self.build.pool.keys()
        left = [
            self.cache._ledger._entries,
            self.cache._ledger._retired,
            self.cache._ledger.dropped,
        ]
        assert not any(left)
        assert not self.cache._ledger._lock.locked()


class ColdLoad(Scenario):
    def act(self) -> None:
        self.use("a+x")


class Hit(Scenario):
    def arrange(self) -> None:
        self.use("a+x")

    def act(self) -> None:
        self.use("a+x")
        self.cache.get_or_load(spec("a+x"))


class Eviction(Scenario):
    def arrange(self) -> None:
        for name in ("b", "c"):
            self.use(name)

    def act(self) -> None:
        self.use("a")
        self.use("a+y")


class SwapOfAdapters(Scenario):
    max_size = 1

    def act(self) -> None:
        for name in ("a+x", "a+y", "a+x"):
            self.use(name)


class FailingLoad(Scenario):
    expected = (SwayError,)

    def act(self) -> None:
        self.build.load_errors["a"] = [RuntimeError("broken")]
        self.use("a")


class FailingMeasure(Scenario):
    expected = (SwayError,)

    def act(self) -> None:
        self.build.measure_errors["a"] = [RuntimeError("broken")]
        self.use("a")


class RaisingClose(Scenario):
    max_size = 1

    def arrange(self) -> None:
        self.use("b")
        self.build.close_errors["b"] = [RuntimeError("stuck")]

    def act(self) -> None:
        self.use("a")


class RetiredRelease(Scenario):
    def arrange(self) -> None:
        self.held = [self.cache.acquire(spec("a+x")), self.cache.acquire(spec("b"))]
        self.cache.evict_all()

    def act(self) -> None:
        for lease in self.held:
            lease.release()


class EndOfAnOwner(Scenario):
    def arrange(self) -> None:
        self.owner = Owner("a test")
        self.held = [self.cache.acquire(spec("a+x"), owner=self.owner), self.cache.acquire(spec("b"))]
        self.cache.evict_all()

    def act(self) -> None:
        self.cache.end(self.owner)


class Retirement(Scenario):
    def arrange(self) -> None:
        self.held = [self.cache.acquire(spec("a"))]
        self.use("b")

    def act(self) -> None:
        self.cache.retire(self.held[0].cached)
        self.cache.retire(self.cache.get_or_load(spec("b")))


class Waiter(Scenario):
    """This thread waits for another thread's load, which continues once this thread waits."""

    def arrange(self) -> None:
        gate = self.build.load_gate("a")
        leader: Call[None] = Call(partial(self.use, "a"))
        self.calls = [leader]
        gate.wait()
        self.watched.on_wait = gate.open

    def act(self) -> None:
        self.use("a")


class WaiterForAClose(Scenario):
    def arrange(self) -> None:
        self.use("a")
        gate = self.build.close_gate("a")
        evicter: Call[None] = Call(self.cache.evict_all)
        self.calls = [evicter]
        gate.wait()
        self.watched.on_wait = gate.open

    def act(self) -> None:
        self.use("a")


class WaiterForRoom(Scenario):
    max_size = 1

    def arrange(self) -> None:
        gate = self.build.load_gate("b")
        holder: Call[None] = Call(partial(self.use, "b"))
        self.calls = [holder]
        gate.wait()
        self.watched.on_wait = gate.open

    def act(self) -> None:
        self.use("a")


class Leader(Scenario):
    """Other threads wait for this thread's load; after the interrupt, one of them takes over."""

    def act(self) -> None:
        self.build.inside["a"] = self.start_waiters
        self.use("a")

    def start_waiters(self) -> None:
        self.build.inside.clear()
        self.calls = [Call(partial(self.use, "a")) for _ in range(2)]
        self.watched.until_waiting(2)


class FailingLeader(Leader):
    expected = (SwayError,)

    def start_waiters(self) -> None:
        super().start_waiters()
        raise RuntimeError("broken")

    def verify(self) -> None:
        for call in self.calls:
            assert isinstance(call.error(), SwayError | None)
        self.calls = []
        super().verify()


class LargerThanEstimated(Scenario):
    max_size = 3
    max_bytes = 300

    def arrange(self) -> None:
        for name in ("b", "c"):
            self.use(name)
        self.build.sizes["a"] = {"a": 250}

    def act(self) -> None:
        self.use("a")


class Refusal(Scenario):
    max_size = 1
    expected = (SwayError,)

    def arrange(self) -> None:
        self.held = [self.cache.acquire(spec("b"))]

    def act(self) -> None:
        self.use("a")


class NestedLoad(Scenario):
    expected = (SwayError,)

    def act(self) -> None:
        self.build.inside["a"] = partial(self.use, "b")
        self.use("a")
        self.build.inside["c"] = partial(self.use, "c")
        self.use("c")


class EvictAll(Scenario):
    max_size = 3

    def arrange(self) -> None:
        self.held = [self.cache.acquire(spec("a"))]
        for name in ("b", "c"):
            self.use(name)

    def act(self) -> None:
        self.cache.evict_all()


class Shutdown(Scenario):
    max_size = 3

    def arrange(self) -> None:
        self.held = [self.cache.acquire(spec("a")), self.cache.acquire(spec("b"))]
        self.cache.retire(self.held[0].cached)
        self.use("c")
        self.build.close_errors["c"] = [RuntimeError("stuck")]

    def act(self) -> None:
        self.cache.shutdown()


SCENARIOS = [
    ColdLoad,
    Hit,
    Eviction,
    SwapOfAdapters,
    FailingLoad,
    FailingMeasure,
    RaisingClose,
    RetiredRelease,
    EndOfAnOwner,
    Retirement,
    Waiter,
    WaiterForAClose,
    WaiterForRoom,
    Leader,
    FailingLeader,
    LargerThanEstimated,
    Refusal,
    NestedLoad,
    EvictAll,
    Shutdown,
]


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Exclude existing objects from garbage collection, which is part of each check, to save time."""
    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    logging.disable(logging.NOTSET)


def _apart(scenario: Scenario) -> Iterator[None]:
    """Act in a generator. It has an exception state of its own, which a trace function that raises can leave wrong."""
    scenario.act()
    yield


def _strike(scenario: Scenario, line: int) -> Interrupter:
    interrupter = Interrupter(CACHE_FILES, line)
    interrupted = False
    try:
        with interrupter:
            next(_apart(scenario))
    except KeyboardInterrupt:
        interrupted = True
    except scenario.expected:
        pass
    assert interrupted == bool(interrupter.where), "the interrupt was swallowed, or hidden by another error"
    return interrupter


@pytest.mark.parametrize("make", SCENARIOS, ids=lambda make: make.__name__)
def test_an_interrupt_at_any_line_loses_nothing(make: type[Scenario]) -> None:
    line = 0
    where = "no interrupt"
    try:
        while where:
            line += 1
            scenario = make()
            where = _strike(scenario, line).where
            scenario.verify()
    except BaseException as error:
        error.add_note(f"the interrupt struck in {where}, line event {line}")
        raise
    assert line > 30


class InterrupterOfCloses(Interrupter):
    """Raises KeyboardInterrupt at the n-th bytecode around the call of a close, or as the close begins."""

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if _closes(frame.f_back):  # the backend counts a close that has begun
            return None
        if _closes(frame):
            self._strike(frame)
        elif frame.f_code in (locking.close_all.__code__, closing.Closer._call_closers.__code__):
            frame.f_trace_opcodes = True
            return self._line
        return None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            self._strike(frame)
        return self._line


def _closes(frame: FrameType | None) -> bool:
    """Whether a frame is in the ``close()`` of a fake backend."""
    while frame is not None and frame.f_code is not SharingBackend.close.__code__:
        frame = frame.f_back
    return frame is not None


CLOSING = [Eviction, SwapOfAdapters, RetiredRelease, EndOfAnOwner, LargerThanEstimated, EvictAll]
"""Scenarios without errors: a trace function that raises as an error is caught would confuse Python."""


@pytest.mark.parametrize("make", CLOSING, ids=lambda make: make.__name__)
def test_an_interrupt_between_any_two_bytecodes_of_a_close_loses_no_backend(make: type[Scenario]) -> None:
    code = 0
    where = "no interrupt"
    try:
        while where:
            code += 1
            scenario = make()
            interrupter = InterrupterOfCloses(frozenset(), code)
            with suppress(KeyboardInterrupt, *scenario.expected), interrupter:
                scenario.act()
            where = interrupter.where
            scenario.verify()
    except BaseException as error:
        error.add_note(f"the interrupt struck in {where}, bytecode {code}")
        raise
    assert code > 20


class PoolUser:
    """Uses a shared value from its load to its close, and repeats interrupted steps."""

    def __init__(self) -> None:
        self.loads = self.closes = 0
        self.pool: pool.SharedPool[str, int] = pool.SharedPool(self.close)
        self.shares: list[pool.PoolLease[int]] = []

    def load(self) -> int:
        self.loads += 1
        return self.loads

    def close(self, value: int) -> None:
        self.closes += 1

    def act(self) -> None:
        with self.pool.pin("a"):
            self.shares.append(self.pool.acquire("a", self.load))
        with self.pool.pin("a"):
            self.shares.append(self.pool.acquire("a", self.load))
        for share in self.shares:
            share.release()

    def verify(self) -> None:
        gc.collect()
        Call[None](self.again).result()
        assert self.closes == self.loads
        assert not self.pool.keys()

    def again(self) -> None:
        for share in self.shares:
            share.release()
        self.pool.acquire("a", self.load).release()


def test_an_interrupt_at_any_line_of_the_pool_loses_nothing() -> None:
    line = 0
    where = "no interrupt"
    while where:
        line += 1
        user = PoolUser()
        act: Callable[[], None] = user.act
        interrupter = Interrupter(POOL_FILES, line)
        try:
            with interrupter:
                act()
        except KeyboardInterrupt:
            pass
        where = interrupter.where
        try:
            user.verify()
        except BaseException as error:
            error.add_note(f"the interrupt struck in {where}, line event {line}")
            raise
    assert line > 50
