"""Many threads at once, with faults; an oracle counts live backends independently of the cache.

``SWAY_FIRE=soak`` runs for ten minutes with 64 threads.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.entries import SizeByPart
from pytest_sway.errors import BackendLoadError, CacheFullError
from tests.unit.fakes import Call, FakeBackend, InformedFakeBuild, name_of, spec
from tests.unit.fire.profiles import PROFILE

NAMES = ("a", "a+x", "b", "b+x", "c", "c+x")


class Exit(BaseException):
    """Neither an Exception nor one of the known interrupts."""


class FaultyBuild(InformedFakeBuild):
    """5% of loads fail and 2% exit, 5% of closes raise and 1% are slow, 5% of sizes are unknown or wrong."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.faults: Counter[str] = Counter()
        self.held: Counter[FakeBackend] = Counter()
        self.loading: Counter[str] = Counter()
        self.broken_rules: list[str] = []

    def strikes(self, fault: str, probability: float) -> bool:
        with self.lock:
            strikes = self.random.random() < probability
            self.faults[fault] += strikes
        return strikes

    def __call__(self, asked: Any, *, adapter_path: Any = None) -> Any:
        with self.lock:
            self.loading[asked] += 1
            if self.loading[asked] > 1:
                self.broken_rules.append(f"two loads of {asked} at once")
        try:
            if self.strikes("load raises", 0.05):
                raise RuntimeError("a fault")
            if self.strikes("load exits", 0.02):
                raise Exit
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
        if self.strikes("close is slow", 0.01):
            for _ in range(100):
                os.sched_yield()
        if self.strikes("close raises", 0.05):
            raise RuntimeError("a fault")

    def estimate(self, asked: Any) -> SizeByPart | None:
        return None if self.strikes("size unknown", 0.025) else super().estimate(asked)

    def measure(self, backend: Any) -> SizeByPart | None:
        if self.strikes("size wrong", 0.025):
            return {name_of(backend.spec): 150}
        return super().measure(backend)


@dataclass
class Stress:
    """A cache, its faulty build and the threads' counts."""

    seed: int
    max_size: int
    threads: int
    operations: int
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.build = FaultyBuild(self.seed)
        self.cache = BackendCache(
            self.max_size, max_bytes=None if self.seed % 2 else 120 * self.max_size, build=self.build, lease_timeout=0.2
        )
        self.names = NAMES[: 2 * self.max_size]

    def run(self) -> None:
        for call in [Call(partial(self.work, number)) for number in range(self.threads)]:
            call.result()
        self.cache.shutdown()
        assert not self.build.broken_rules
        assert self.build.oracle.peak <= self.max_size
        assert self.build.oracle.live == 0
        assert all(backend.closes == 1 for backend in self.build.built)
        assert self.build.base_loads == self.build.base_closes
        left = [
            self.cache._ledger._entries,
            self.cache._ledger._retired,
            self.build.pool.keys(),
        ]
        assert not any(left)
        total = self.cache.stats.total()
        assert total.loads <= len(self.build.built)
        assert total.failures >= self.build.faults["load raises"]
        assert len(self.cache.stats.close_errors) == self.build.faults["close raises"]

    def work(self, number: int) -> None:
        mine = random.Random(f"{self.seed} {number}")
        done: Counter[str] = Counter()
        for _ in range(self.operations // self.threads):
            try:
                self.step(mine, done)
            except (BackendLoadError, CacheFullError, Exit) as error:
                done[type(error).__name__] += 1
        with self.build.lock:
            self.done += done

    def step(self, mine: random.Random, done: Counter[str]) -> None:
        chance = mine.random()
        name = mine.choice(self.names)
        if chance < 0.01:
            done["evict_all"] += 1
            self.cache.evict_all()
        elif chance < 0.03:
            done["retire"] += 1
            self.cache.retire(self.cache.get_or_load(spec(name)))
        elif chance < 0.05:
            done["dropped"] += 1
            self.cache.acquire(spec(name))
        elif chance < 0.3:
            done["get_or_load"] += 1
            self.cache.get_or_load(spec(name))
        else:
            done["lease"] += 1
            self.lease(mine, name, nested=chance > 0.98)

    def lease(self, mine: random.Random, name: str, *, nested: bool) -> None:
        lease = self.cache.acquire(spec(name))
        backend = lease.backend
        with self.build.lock:
            self.build.held[backend] += 1
        try:
            assert backend.use() == name
            if nested:
                self.cache.get_or_load(spec(mine.choice(self.names)))
            os.sched_yield()
            assert backend.use() == name
        finally:
            with self.build.lock:
                self.build.held[backend] -= 1
            lease.release()
            if mine.random() < 0.1:
                lease.release()


@pytest.fixture
def _restless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make threads switch, and look for dropped leases, as often as possible."""
    usual = sys.getswitchinterval()
    monkeypatch.setattr("pytest_sway.cache.backend_cache._GLANCE", 0.01)
    logging.disable(logging.WARNING)
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_restless")
@pytest.mark.parametrize("max_size", [1, 2, 3])
def test_nothing_breaks_under_many_threads_and_faults(max_size: int) -> None:
    done: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    end = time.monotonic() + PROFILE.stress_seconds / 3
    seed = 0
    while seed < PROFILE.seeds or time.monotonic() < end:
        stress = Stress(seed, max_size, PROFILE.stress_threads, PROFILE.operations)
        try:
            stress.run()
        except BaseException as error:
            error.add_note(f"max_size {max_size}, seed {seed}")
            raise
        done += stress.done
        faults += stress.build.faults
        seed += 1
    print(f"max_size {max_size}: {seed} seeds; operations {dict(done)}; faults {dict(faults)}")
    assert min(faults[fault] for fault in ("load raises", "load exits", "close raises", "size wrong")) > 0
