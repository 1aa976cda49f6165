"""Counted fakes for the cache: backends, builds with gates, an independent live count, and threads with deadlines.

Nothing here sleeps. A test waits for events: a thread reached a gate, waits in the cache, or ended. Each wait has a
deadline, after which the stacks of all threads are printed.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from pytest_sway.backends.checkpoints.plan import Plan
from pytest_sway.backends.contract import Build
from pytest_sway.backends.local.pool import PoolLease, SharedPool
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.entries import Lease, SizeByPart
from pytest_sway.errors import BackendClosedError
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.locking import OneShotEvent

T = TypeVar("T")

DEADLINE = float(os.environ.get("SWAY_TEST_DEADLINE", "20"))
"""Seconds after which a wait fails that should end at once."""


def spec(name: str) -> ModelSpec:
    """Return the spec of a name such as ``a``, or ``a+x`` for adapter x on base a."""
    base, _, adapter = name.partition("+")
    return ModelSpec(kind="dummy", base=f"org/{base}", adapter=Path("/nowhere") / adapter if adapter else None)


def name_of(asked: ModelSpec) -> str:
    """Return the name of a spec, the inverse of `spec`."""
    return asked.base.removeprefix("org/") + "".join(f"+{Path(adapter).name}" for adapter in asked.adapters)


def names(cache: BackendCache) -> list[str]:
    """Return the names of the ready backends, most recently used last."""
    return [name_of(loaded) for loaded in cache.loaded_specs()]


class Gate:
    """A gate at which a thread stops until the test opens it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def pass_through(self) -> None:
        """Stop the calling thread until the gate is opened."""
        self.reached.set()
        assert self._open.wait(DEADLINE), "nobody opened the gate"

    def wait(self) -> None:
        """Wait until a thread has reached the gate."""
        if not self.reached.wait(DEADLINE):
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
            raise AssertionError("nobody came to the gate")

    def open(self) -> None:
        self._open.set()


@dataclass
class Oracle:
    """Counts live backends without the cache: from the start of a load to its failure or the end of its close."""

    live: int = 0
    peak: int = 0
    loads: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, name: str) -> None:
        with self.lock:
            self.live += 1
            self.peak = max(self.peak, self.live)
            self.loads[name] += 1
            self.log.append(f"load {name}")

    def end(self, name: str, how: str) -> None:
        with self.lock:
            self.live -= 1
            self.log.append(f"{how} {name}")


class FakeBackend:
    """A differential backend without a model, which counts its closes and refuses to be used after the first."""

    def __init__(self, built_from: ModelSpec, build: FakeBuild) -> None:
        self.spec = built_from
        self.name = name_of(built_from)
        self.closes = 0
        self._build = build

    def use(self) -> str:
        if self.closes:
            raise BackendClosedError(f"{self.name} was used after its close")
        return self.name

    @contextmanager
    def as_base(self) -> Iterator[str]:
        yield self.use()

    @contextmanager
    def as_finetuned(self) -> Iterator[str]:
        yield self.use()

    def close(self) -> None:
        self.closes += 1
        try:
            self._build.closing(self)
        finally:
            self._build.oracle.end(self.name, "closed")


class Unclosable:
    """A backend without ``close()``."""

    def __init__(self, built_from: ModelSpec) -> None:
        self.spec = built_from


class FakeBuild:
    """A plain build function; its loads and closes stop at gates and raise the test's errors."""

    def __init__(self) -> None:
        self.oracle = Oracle()
        self.built: list[FakeBackend] = []
        self.load_gates: dict[str, Gate] = {}
        self.close_gates: dict[str, Gate] = {}
        self.load_errors: dict[str, list[BaseException]] = defaultdict(list)
        self.close_errors: dict[str, list[BaseException]] = defaultdict(list)
        self.inside: dict[str, Callable[[], object]] = {}
        self.inside_close: dict[str, Callable[[], object]] = {}

    def __call__(self, asked: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        name = name_of(asked)
        self.oracle.begin(name)
        try:
            if name in self.load_gates:
                self.load_gates[name].pass_through()
            if name in self.inside:
                self.inside[name]()
            if self.load_errors[name]:
                raise self.load_errors[name].pop(0)
            backend = self.make(asked)
        except BaseException:
            self.oracle.end(name, "failed")
            raise
        self.built.append(backend)
        return backend

    def make(self, asked: ModelSpec) -> FakeBackend:
        return FakeBackend(asked, self)

    def closing(self, backend: FakeBackend) -> None:
        """Run a backend's ``close()``."""
        if backend.name in self.close_gates:
            self.close_gates[backend.name].pass_through()
        if backend.name in self.inside_close:
            self.inside_close[backend.name]()
        if self.close_errors[backend.name]:
            raise self.close_errors[backend.name].pop(0)

    def load_gate(self, name: str) -> Gate:
        return self.load_gates.setdefault(name, Gate())

    def close_gate(self, name: str) -> Gate:
        return self.close_gates.setdefault(name, Gate())

    @property
    def loads(self) -> Counter[str]:
        return self.oracle.loads

    @property
    def closes(self) -> dict[str, list[int]]:
        """Return how often each backend was closed, by name, in the order of their loads."""
        closes: dict[str, list[int]] = defaultdict(list)
        for backend in self.built:
            closes[backend.name].append(backend.closes)
        return dict(closes)


class SharingBackend(FakeBackend):
    """A backend that shares its base with others."""

    def __init__(self, built_from: ModelSpec, build: InformedFakeBuild, base: PoolLease[str]) -> None:
        super().__init__(built_from, build)
        self.base = base

    def close(self) -> None:
        try:
            self.base.release()
        finally:
            super().close()


class InformedFakeBuild(FakeBuild, Build):
    """A build that makes plans, with shared bases.

    A base takes 100 bytes and an adapter 10, unless ``estimates`` or ``sizes`` say otherwise by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.base_loads: Counter[str] = Counter()
        self.base_closes: Counter[str] = Counter()
        self.pool: SharedPool[str, str] = SharedPool(self._close_base)
        self.estimates: dict[str, SizeByPart | None] = {}
        self.sizes: dict[str, SizeByPart | None] = {}
        self.check_errors: dict[str, list[Exception]] = defaultdict(list)
        self.measure_errors: dict[str, list[Exception]] = defaultdict(list)

    def resolve(self, asked: ModelSpec) -> ModelSpec:
        return asked

    def check(self, asked: ModelSpec) -> Plan:
        if self.check_errors[name_of(asked)]:
            raise self.check_errors[name_of(asked)].pop(0)
        return replace(Plan.of(asked), sizes=self.estimate(asked))

    def build(self, plan: Plan) -> Any:
        return self(plan.spec)

    def estimate(self, asked: ModelSpec) -> SizeByPart | None:
        name = name_of(asked)
        return self.estimates[name] if name in self.estimates else self._usual(name)

    def measure(self, backend: Any) -> SizeByPart | None:
        if self.measure_errors[backend.name]:
            raise self.measure_errors[backend.name].pop(0)
        return self.sizes[backend.name] if backend.name in self.sizes else self.estimate(backend.spec)

    def pin(self, plan: Plan) -> AbstractContextManager[None]:
        return self.pool.pin(plan.spec.base)

    def make(self, asked: ModelSpec) -> FakeBackend:
        return SharingBackend(asked, self, self.pool.acquire(asked.base, partial(self._load_base, asked.base)))

    @staticmethod
    def _usual(name: str) -> SizeByPart:
        base, _, adapter = name.partition("+")
        return {base: 100, name: 10} if adapter else {base: 100}

    def _load_base(self, base: str) -> str:
        self.base_loads[base] += 1
        return f"{base} #{self.base_loads[base]}"

    def _close_base(self, base: str) -> None:
        self.base_closes[base.partition(" ")[0]] += 1


class Watched:
    """Watches a cache's waits, and tells the test how many threads wait."""

    def __init__(self, cache: BackendCache) -> None:
        self.waiting = 0
        self.on_wait: Callable[[], object] = lambda: None
        self._seen = threading.Condition()
        self._cache = cache
        self._usual = cache._wait
        cache._wait = self._wait  # type: ignore[method-assign]

    def _wait(self, event: OneShotEvent, timeout: float) -> None:
        self._count(+1)
        self.on_wait()
        try:
            self._usual(event, timeout)
        finally:
            self._count(-1)

    def until_waiting(self, threads: int = 1) -> None:
        """Wait until this many threads wait in the cache."""
        with self._seen:
            if not self._seen.wait_for(lambda: self.waiting >= threads, DEADLINE):
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
                raise AssertionError(f"{self.waiting} threads wait in the cache, not {threads}")

    def crowd(self, build: FakeBuild, waiters: int) -> tuple[Gate, list[Call[Lease]]]:
        """Start requests for ``a``: the first loads it and stops at its gate; the others wait for that load."""
        gate = build.load_gate("a")
        calls = [Call(partial(self._cache.acquire, spec("a")))]
        gate.wait()
        calls += [Call(partial(self._cache.acquire, spec("a"))) for _ in range(waiters)]
        self.until_waiting(waiters)
        return gate, calls

    def _count(self, change: int) -> None:
        with self._seen:
            self.waiting += change
            self._seen.notify_all()


class Call(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self, function: Callable[[], T], name: str | None = None) -> None:
        self._function = function
        self._values: list[T] = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._values.append(self._function())
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def result(self) -> T:
        """Return the call's result, or raise its error."""
        error = self.error()
        if error is not None:
            raise error
        return self._values[0]

    def error(self) -> BaseException | None:
        """Return the call's error."""
        self.thread.join(DEADLINE)
        if self.thread.is_alive():
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
            raise AssertionError("the call did not end")
        return self._error
