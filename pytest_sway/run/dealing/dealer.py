"""`Dealer` decides which test runs on which worker, so that workers load few bases and none waits long.

It works on plain values, events and a clock, without pytest and pytest-xdist. The tests of one base are a queue. A
worker goes on with the base that it has. When its queue is empty, it takes the longest queue that no worker has. If
there is none, it takes over the end of another worker's queue, if waiting for those tests takes longer
than a load.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Generic, NamedTuple, TypeVar

from pytest_sway.run.dealing.durations import Estimates

_AHEAD: Final = 0.1
"""Seconds of tests that a worker has beyond the running one, so that it need not wait for the next."""
_MOST_AHEAD: Final = 32
_LEAST: Final = 2
"""pytest-xdist runs a test once it knows the next one, for the fixtures that both use."""
_SHORTEST_WAIT: Final = 0.1
"""Seconds. For less, nothing is taken over, since it may need an adapter that the worker does not have."""
_BISECTIONS: Final = 30

W = TypeVar("W", bound=Hashable)


class Task(NamedTuple):
    """What is known of a test before it runs.

    Attributes:
        bases: The bases that it needs; none if they are not known.
        group: Tests of one group run in one worker.
        seconds: How long it took in an earlier run, if that is known.
    """

    bases: tuple[str, ...] = ()
    group: str | None = None
    seconds: float | None = None


class Deal(NamedTuple, Generic[W]):
    """What to tell a worker.

    Attributes:
        worker: The worker.
        tests: The positions of the tests that it gets.
        last: Whether it gets nothing more.
    """

    worker: W
    tests: tuple[int, ...]
    last: bool


@dataclass(eq=False, slots=True)
class _Queue:
    """Tests of one base, or without a known base, that no worker has got yet. A unit goes to one worker."""

    base: str | None = None
    units: deque[tuple[int, ...]] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class _Worker:
    """A worker.

    Attributes:
        sent: The tests that it has got and not completed; it runs the first.
        queue: The queue that it goes on with.
        held: The bases of the last test that it completed.
        since: When it began the first of ``sent``.
        stopped: Whether it gets nothing more.
        refused: When it last found nothing worth taking over.
    """

    sent: list[int] = field(default_factory=list)
    queue: _Queue = field(default_factory=_Queue)
    held: tuple[str, ...] = ()
    since: float = 0.0
    stopped: bool = False
    refused: float = -math.inf


class Dealer(Generic[W]):
    """Deals each test to one worker.

    Call `deals` after each event, and do what it says.

    Args:
        tasks: The tests, in the order in which the tests of one base should run.
        loads: The seconds of loads in earlier runs, by base.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        loads: Mapping[str, float] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tasks = tasks
        self._clock = clock
        self._estimates = Estimates(loads)
        self._workers: dict[W, _Worker] = {}
        self._free: list[_Queue] = []
        self.shared_loads = 0
        """How often a worker loaded a base in order to take over another's tests."""
        self._put_back(range(len(tasks)))

    # --- events -------------------------------------------------------------------------------------------------------

    def join(self, worker: W) -> None:
        """Add a worker that is ready for tests."""
        self._workers[worker] = _Worker()

    def done(self, worker: W, test: int, seconds: float, loading: float = 0.0) -> float:
        """Note that a worker has completed a test.

        Args:
            worker: The worker.
            test: The position of the test.
            seconds: How long it took, with loads.
            loading: Seconds of loads in it, without imports.

        Returns:
            The seconds of the test without the load of its base.
        """
        state = self._workers[worker]
        state.sent.remove(test)
        bases = self._tasks[test].bases
        new = [base for base in bases if base not in state.held]
        if new and loading:
            seconds = max(0.0, seconds - loading)
            for base in new:
                self._estimates.note_load(base, loading / len(new))
        self._estimates.note_test(self._base_of((test,)), seconds)
        state.held = bases or state.held
        state.since = self._clock()
        return seconds

    def stop(self, worker: W) -> None:
        """Deal a worker nothing more; others get its queue."""
        state = self._workers[worker]
        state.stopped = True
        if state.queue.units:
            self._free.append(state.queue)
        state.queue = _Queue()

    def leave(self, worker: W) -> int | None:
        """Remove a worker; others get its tests, but for the one that it was running, which is returned."""
        self.stop(worker)
        sent = self._workers.pop(worker).sent
        self._put_back(sent[1:])
        return sent[0] if sent else None

    def again(self, test: int) -> None:
        """Deal a test again that `leave` returned."""
        self._put_back([test])

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether there are tests that no worker has got."""
        return any(queue.units for queue in self._queues())

    @property
    def most_sent(self) -> int:
        """The most tests that a worker has got and not completed."""
        return max((len(state.sent) for state in self._workers.values()), default=0)

    @property
    def loads(self) -> dict[str, float]:
        """The mean seconds of this run's loads, by base."""
        return self._estimates.loads()

    def __contains__(self, worker: object) -> bool:
        return worker in self._workers

    # --- dealing ------------------------------------------------------------------------------------------------------

    def deals(self) -> list[Deal[W]]:
        """Decide what the workers get now."""
        dealt: dict[W, list[int]] = {}
        asking = [worker for worker, state in self._workers.items() if not state.stopped]
        while asking:
            worker = min(asking, key=lambda each: len(self._workers[each].sent))
            state = self._workers[worker]
            unit = self._next_unit(state)
            if unit is not None:
                if not state.sent:
                    state.since = self._clock()
                state.sent += unit
                dealt.setdefault(worker, []).extend(unit)
                continue
            asking.remove(worker)
            if len(state.sent) == 1:  # it could not even run this one without a next
                state.stopped = True
                dealt.setdefault(worker, [])
        return [Deal(worker, tuple(tests), self._workers[worker].stopped) for worker, tests in dealt.items()]

    def _next_unit(self, state: _Worker) -> tuple[int, ...] | None:
        """Return the tests to send next; ``None`` if there are none, or if the worker has enough."""
        short = len(state.sent) < _LEAST
        if short and not state.queue.units:
            state.queue = self._longest_free(state) or self._taken_over(state) or _Queue()
        wants = state.queue.units and (short or self._has_little(state))
        return state.queue.units.popleft() if wants else None

    def _has_little(self, state: _Worker) -> bool:
        return len(state.sent) < _MOST_AHEAD and sum(map(self._seconds, state.sent[1:])) < _AHEAD

    def _longest_free(self, state: _Worker) -> _Queue | None:
        """Take the longest queue that no worker has; one of the worker's base first, one without bases last.

        Tests without known bases can fill any gap at the end, so they come last.
        """
        if not self._free:
            return None
        held = self._will_hold(state)
        queue = max(self._free, key=lambda each: (each.base in held, each.base is not None, self._length(each)))
        self._free.remove(queue)
        return queue

    def _taken_over(self, thief: _Worker) -> _Queue | None:
        """Take over the end of another's queue, if waiting for its tests takes longer than the load that it needs here.

        The other keeps what it can run until all workers end, if they share what is left evenly. So each such cut
        settles the share of one worker: N workers need at most N - 1 of them, if no estimate is wrong.
        """
        if not thief.sent and self._clock() - thief.refused < _SHORTEST_WAIT:
            return None  # idle workers would measure a long queue again at each event
        live = [state for state in self._workers.values() if not state.stopped]
        sent = {state: self._left(state) for state in live}
        queued = {state: self._length(state.queue) for state in live}
        victims = [state for state in live if state.queue.units]
        loads = {state: self._load_of(self._end_of(state.queue), self._will_hold(thief)) for state in victims}
        tests = {state: sum(map(self._seconds, state.sent)) for state in live}
        idle = {state: min(sent[state], tests[state]) + queued[state] - tests[thief] for state in victims}
        worth = [state for state in victims if idle[state] > max(loads[state], _SHORTEST_WAIT)]
        for victim in sorted(worth, key=lambda state: sent[state] + queued[state] - loads[state], reverse=True):
            needed = self._end_of(victim.queue)
            costs = (self._load_of(needed, self._will_hold(state)) for state in live)
            share = _share([*zip(sent.values(), queued.values(), costs, strict=True)])
            taken = self._cut(victim.queue, sent[victim] + queued[victim] - share)
            if taken.units:
                self.shared_loads += bool(set(needed).difference(self._will_hold(thief)))
                return taken
        thief.refused = self._clock()
        return None

    def _cut(self, queue: _Queue, seconds: float) -> _Queue:
        """Cut off the end of a queue that takes about so many seconds."""
        cut = _Queue(queue.base)
        taken = 0.0
        while queue.units:
            more = sum(map(self._seconds, queue.units[-1]))
            if taken + more / 2 > seconds:
                break
            taken += more
            cut.units.appendleft(queue.units.pop())
        return cut

    # --- estimates ----------------------------------------------------------------------------------------------------

    def _seconds(self, test: int) -> float:
        known = self._tasks[test].seconds
        return self._estimates.of_test(self._base_of((test,))) if known is None else known

    def _length(self, queue: _Queue) -> float:
        return sum(self._seconds(test) for unit in queue.units for test in unit)

    def _left(self, state: _Worker) -> float:
        """Return the seconds until a worker has run what it has got."""
        total, held = 0.0, state.held
        for place, test in enumerate(state.sent):
            bases = self._tasks[test].bases
            seconds = self._seconds(test) + self._load_of(bases, held)
            total += max(0.0, seconds - (self._clock() - state.since)) if place == 0 else seconds
            held = bases or held
        return total

    def _load_of(self, bases: Iterable[str], held: Sequence[str]) -> float:
        return sum(self._estimates.of_load(base) for base in set(bases).difference(held))

    # --- queues -------------------------------------------------------------------------------------------------------

    def _queues(self) -> Iterator[_Queue]:
        yield from self._free
        yield from (state.queue for state in self._workers.values())

    def _put_back(self, tests: Iterable[int]) -> None:
        """Put tests at the beginning of free queues, in their order; tests of one group are one unit."""
        units: dict[Hashable, list[int]] = {}
        for test in tests:
            group = self._tasks[test].group
            units.setdefault(test if group is None else (group,), []).append(test)
        by_base: dict[str | None, list[tuple[int, ...]]] = {}
        for unit in units.values():
            by_base.setdefault(self._base_of(unit), []).append(tuple(unit))
        free = {queue.base: queue for queue in self._free}
        for base, returned in by_base.items():
            if base not in free:
                free[base] = _Queue(base)
                self._free.append(free[base])
            free[base].units.extendleft(reversed(returned))

    def _end_of(self, queue: _Queue) -> list[str]:
        """Return the bases of a queue's last unit."""
        return [base for test in queue.units[-1] for base in self._tasks[test].bases]

    def _will_hold(self, state: _Worker) -> tuple[str, ...]:
        """Return the bases that a worker has when it has run what it has got."""
        return next((self._tasks[test].bases for test in reversed(state.sent) if self._tasks[test].bases), state.held)

    def _base_of(self, unit: Iterable[int]) -> str | None:
        return next((self._tasks[test].bases[0] for test in unit if self._tasks[test].bases), None)


def _share(workers: Sequence[tuple[float, float, float]]) -> float:
    """Return the seconds after which all workers end, if those with more work give the rest to those with less.

    Args:
        workers: The seconds of tests that each has got, of those in its queue, and of the load that it needs in order
            to help.
    """
    low, high = 0.0, max(sent + queued for sent, queued, _ in workers)
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        given = sum(min(queued, max(0.0, sent + queued - share)) for sent, queued, _ in workers)
        taken = sum(max(0.0, share - sent - queued - load) for sent, queued, load in workers)
        low, high = (share, high) if given > taken else (low, share)
    return high
