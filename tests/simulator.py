"""Simulates workers of pytest-xdist under its own schedulers and under pytest-sway's, with a virtual clock."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any, Final

from xdist.remote import Producer  # type: ignore[import-untyped]
from xdist.scheduler import (  # type: ignore[import-untyped]
    LoadGroupScheduling,
    LoadScheduling,
    WorkStealingScheduling,
)

from pytest_sway.run.dealing.durations import Remembered
from pytest_sway.run.dealing.xdist_scheduler import SwayScheduling
from pytest_sway.run.scheduling import Needs, dealt, ordered

_SHUTDOWN: Final = -1


@dataclass(frozen=True)
class Work:
    """A simulated test.

    Attributes:
        bases: The bases that it needs; none if they are not known.
        seconds: How long it takes when they are loaded.
        adapter: An adapter; a worker loads it if its last test had another.
        group: The name of its mark ``xdist_group``.
    """

    bases: tuple[str, ...]
    seconds: float
    adapter: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Costs:
    """Seconds of what is no test.

    Attributes:
        load: Of a load of a base.
        adapter: Of a load of an adapter.
        start: Until a worker can load its first base.
        reply: From the end of a test until its worker has heard what to run next.
    """

    load: float = 0.0
    adapter: float = 0.0
    start: float = 0.0
    reply: float = 0.0


@dataclass
class Outcome:
    """A simulated run.

    Attributes:
        wall: Its seconds.
        loads: How many bases were loaded.
        adapter_loads: How many adapters were loaded.
        shared_loads: How many of these let workers share the tests of a base, as pytest-sway counts them.
        ran: The tests of each worker, in their order.
        crashed: The tests during which a worker crashed.
        remembered: What the run has learned for the next.
    """

    wall: float = 0.0
    loads: int = 0
    adapter_loads: int = 0
    shared_loads: int = 0
    ran: dict[str, list[int]] = field(default_factory=dict)
    crashed: list[int] = field(default_factory=list)
    remembered: Remembered = field(default_factory=lambda: Remembered({}, {}))


class _Node:
    """A worker as xdist's schedulers see it."""

    def __init__(self, name: str, run: _Run) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.queue: deque[int] = deque()
        self.current: int | None = None
        self.next: int | None = None
        self.busy = False
        self.dead = False
        self.started = False
        self.held: tuple[str, ...] = ()
        self.adapter = ""
        self._run = run

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        assert not self.shutting_down
        self._put(indices)

    def _put(self, indices: Sequence[int]) -> None:
        self.queue.extend(indices)
        self._run.after(0.0, lambda: self._run.go_on(self))

    def send_steal(self, indices: Sequence[int]) -> None:
        stolen = [index for index in self.queue if index in set(indices)]
        if len(stolen) != len(indices):
            stolen = []
        self.queue = deque(index for index in self.queue if index not in set(stolen))
        self._run.after(0.0, lambda: self._run.scheduler.remove_pending_tests_from_node(self, stolen))

    def shutdown(self) -> None:
        if not self.shutting_down:
            self.shutting_down = True
            self._put([_SHUTDOWN])


class _Run:
    def __init__(self, tests: Sequence[Work], costs: Costs, crashes: Callable[[int], bool]) -> None:
        self.tests = tests
        self.costs = costs
        self.crashes = crashes
        self.now = 0.0
        self.outcome = Outcome()
        self.scheduler: Any = None
        self._ids: list[str] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._names = count()

    def after(self, seconds: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), happens))

    def start(self, workers: int, ids: list[str]) -> None:
        self._ids = ids
        nodes = [self._new() for _ in range(workers)]
        for node in nodes:
            self.scheduler.add_node(node)
        for node in nodes:
            self.scheduler.add_node_collection(node, list(ids))
        assert self.scheduler.collection_is_completed
        self.scheduler.schedule()
        self._end_if_finished()
        while self._events:
            self.now, _, happens = heapq.heappop(self._events)
            happens()
            self._end_if_finished()

    def _new(self) -> _Node:
        node = _Node(f"gw{next(self._names)}", self)
        self.outcome.ran[node.gateway.id] = []
        return node

    def _end_if_finished(self) -> None:
        if self.scheduler.tests_finished:
            for node in self.scheduler.nodes:
                node.shutdown()

    def go_on(self, node: _Node) -> None:
        """Run a worker's next test, if it knows the one after it."""
        if node.busy or node.dead:
            return
        if node.current is None and node.queue:
            node.current = node.queue.popleft()
        if node.current == _SHUTDOWN:
            node.dead = True
            self.after(self.costs.reply, lambda: self._finish(node))
            return
        if node.current is not None and node.next is None and node.queue:
            node.next = node.queue.popleft()
        if node.current is None or node.next is None:
            return
        node.busy = True
        if self.crashes(node.current):
            node.dead = True
            self.after(self.costs.reply, lambda: self._crash(node))  # heard after what the worker has completed
            return
        loading, seconds = self._seconds(node, node.current)
        self.after(seconds, lambda: self._complete(node, seconds, loading))

    def _seconds(self, node: _Node, test: int) -> tuple[float, float]:
        work, costs = self.tests[test], self.costs
        new = set(work.bases).difference(node.held)
        self.outcome.loads += len(new)
        loading = len(new) * costs.load
        attaches = bool(work.adapter) and (bool(new) or work.adapter != node.adapter)
        self.outcome.adapter_loads += attaches
        adapter = attaches * costs.adapter
        starting = 0.0 if node.started else costs.start
        node.started = True
        if work.bases:
            node.held, node.adapter = work.bases, work.adapter
        return loading, starting + loading + adapter + work.seconds

    def _complete(self, node: _Node, seconds: float, loading: float) -> None:
        assert node.current is not None
        test, node.current, node.next, node.busy = node.current, node.next, None, False
        self.outcome.ran[node.gateway.id].append(test)
        self.outcome.wall = self.now
        self.after(self.costs.reply, lambda: self._hear(node, test, seconds, loading))
        self.go_on(node)

    def _hear(self, node: _Node, test: int, seconds: float, loading: float) -> None:
        if node not in self.scheduler.nodes:
            return
        if isinstance(self.scheduler, SwayScheduling):
            properties = [("sway_load_seconds", loading)]
            report: Any = SimpleNamespace(node=node, item_index=test, user_properties=properties, failed=False)
            self.scheduler.note_report(report)
        self.scheduler.mark_test_complete(node, test, seconds)

    def _finish(self, node: _Node) -> None:
        assert self.scheduler.remove_node(node) is None

    def _crash(self, node: _Node) -> None:
        assert node.current is not None
        assert self.scheduler.remove_node(node) == self._ids[node.current]
        self.outcome.crashed.append(node.current)
        other = self._new()
        self.scheduler.add_node(other)
        self.scheduler.add_node_collection(other, list(self._ids))
        self.scheduler.schedule()


def simulate(
    dist: str,
    tests: Sequence[Work],
    workers: int,
    costs: Costs,
    *,
    groups: Sequence[int | None] | None = None,
    remembered: Remembered | None = None,
    crashes: Callable[[int], bool] = lambda _: False,
) -> Outcome:
    """Run tests under a scheduler.

    Args:
        dist: ``load``, ``loadgroup`` or ``worksteal``, which are pytest-xdist's, or ``sway``.
        tests: The tests, in the order of their collection.
        workers: The number of workers.
        costs: What loads cost.
        groups: The groups under ``loadgroup``; by default, those of pytest-sway.
        remembered: What earlier runs have learned.
        crashes: Asked at the start of each test, by its position, whether its worker crashes.
    """
    run = _Run(tests, costs, crashes)
    config: Any = SimpleNamespace(
        getvalue=lambda _: ["popen"] * workers,
        getoption=lambda _: None,
        option=SimpleNamespace(loadscopereorder=True),
        cache=None if remembered is None else _Cache(remembered),
    )
    ids = [f"test_x.py::test_{number}" for number in range(len(tests))]
    log = Producer("simulated", enabled=False)
    if dist == "sway":
        run.scheduler = SwayScheduling(config, log, clock=lambda: run.now)
        run.scheduler.note_needs([(work.bases, work.group) for work in tests])
    elif dist == "loadgroup":
        given = dealt([_needs(work) for work in tests], workers) if groups is None else groups
        ids = [nodeid if group is None else f"{nodeid}@{group}" for nodeid, group in zip(ids, given, strict=True)]
        run.scheduler = LoadGroupScheduling(config, log)
    else:
        run.scheduler = {"load": LoadScheduling, "worksteal": WorkStealingScheduling}[dist](config, log)
    run.start(workers, ids)
    if dist == "sway":
        run.outcome.shared_loads = run.scheduler.shared_loads or 0
        run.outcome.remembered = run.scheduler.learned
    return run.outcome


def by_hand(tests: Sequence[Work], workers: int, costs: Costs) -> list[int | None]:
    """Return the best groups for ``loadgroup`` that somebody finds who knows all durations, one for each worker.

    Of all rooms that a worker may have, it takes the smallest into which all fits.
    """
    members: dict[tuple[str, ...], list[int]] = {}
    for position, work in enumerate(tests):
        members.setdefault(work.bases, []).append(position)
    total = sum(work.seconds for work in tests) + costs.load * len(members)
    for percent in count(100):
        groups = _filled(tests, [*members.values()], workers, total / workers * percent / 100, costs.load)
        if groups is not None:
            return groups
    raise AssertionError


def _filled(
    tests: Sequence[Work], bases: list[list[int]], workers: int, room: float, load: float
) -> list[int | None] | None:
    """Put whole bases, longest first, where they fit; cut one that fits nowhere. ``None`` if not all fits."""
    groups: list[int | None] = [None] * len(tests)
    left = [room] * workers

    def seconds(positions: Sequence[int]) -> float:
        return sum(tests[position].seconds for position in positions)

    waiting = sorted(bases, key=seconds, reverse=True)
    while waiting:
        base = waiting.pop(0)
        roomy = [worker for worker in range(workers) if left[worker] >= seconds(base) + load]
        worker = min(roomy, key=left.__getitem__) if roomy else max(range(workers), key=left.__getitem__)
        fits = len(base)
        while fits and seconds(base[:fits]) + load > left[worker] + 1e-9:
            fits -= 1
        if not fits:
            return None
        for position in base[:fits]:
            groups[position] = worker
        left[worker] -= seconds(base[:fits]) + load
        if fits < len(base):
            left[worker] = 0.0
            waiting = sorted([*waiting, base[fits:]], key=seconds, reverse=True)
    return groups


class _Cache:
    """pytest's cache, with the durations of earlier runs."""

    def __init__(self, remembered: Remembered) -> None:
        self._values = {"tests": remembered.tests, "loads": remembered.loads}

    def get(self, _: str, __: object) -> Mapping[str, Mapping[str, float]]:
        return self._values


def collected(tests: Sequence[Work], seed: int = 0) -> list[Work]:
    """Return the tests in the order that pytest-sway gives them if they were collected in a random one."""
    mixed = random.Random(seed).sample(tests, len(tests))
    return [mixed[position] for position in ordered([_needs(work) for work in mixed])]


def _needs(work: Work) -> Needs | None:
    return Needs(work.bases, (work.adapter,)) if work.bases else None
