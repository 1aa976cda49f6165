"""pytest-xdist's scheduler for ``-n`` without ``--dist``.

It tells a `Dealer` what happens, and the workers what to run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from xdist.report import report_collection_diff  # type: ignore[import-untyped]
from xdist.scheduler import LoadScheduling  # type: ignore[import-untyped]

from pytest_sway.report.comparisons import values_of
from pytest_sway.run.dealing.dealer import Dealer, Task
from pytest_sway.run.dealing.durations import Remembered
from pytest_sway.run.dealing.needs import Needed, take_needs


class SwayScheduling:
    """The scheduler, as ``xdist.scheduler.Scheduling`` describes it.

    Until the first tests are dealt, pytest-xdist's scheduler for ``load`` keeps the workers' collections. It reports
    if they differ, and deals the tests if none names a base.

    Args:
        config: The controller's configuration.
        log: pytest-xdist's log.
        clock: Returns the time in seconds.

    Attributes:
        config: The controller's configuration, as in pytest-xdist's own schedulers; pytest-rerunfailures reads it.
        log: pytest-xdist's log, as in its own schedulers.
    """

    def __init__(self, config: pytest.Config, log: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._load = LoadScheduling(config, log)
        self.log = self._load.log
        self._remembered = Remembered.read(config)
        self._needs: Sequence[Needed] = ()
        self._collection: list[str] = []
        self._dealer: Dealer[Any] | None = None
        self._overhead: dict[tuple[Any, int], tuple[float, float]] = {}
        self._failed: set[int] = set()

    @property
    def shared_loads(self) -> int | None:
        """How many loads let workers share a base's tests; ``None`` if no test names a base."""
        return None if self._dealer is None else self._dealer.shared_loads

    # --- collection ---------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Any]:
        """The workers."""
        return list(self._load.nodes)

    @property
    def collection_is_completed(self) -> bool:
        """Whether all workers have collected that were started first."""
        return bool(self._load.collection_is_completed)

    def add_node(self, node: Any) -> None:
        """Add a worker that has started."""
        self._load.add_node(node)

    def note_needs(self, needs: Sequence[Needed]) -> None:
        """Note what the tests need that a worker has collected."""
        self._needs = needs

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        """Add the tests that a worker has collected; a replacement with other tests gets none."""
        if self._dealer is None:
            self._load.add_node_collection(node, collection)
        elif (difference := self._difference(node, list(collection))) is None:
            self._dealer.join(node)
        else:
            report = pytest.CollectReport(node.gateway.id, "failed", difference, result=[])
            self.config.hook.pytest_collectreport(report=report)
            node.shutdown()

    def _difference(self, node: Any, collection: list[str]) -> str | None:
        text: str | None = report_collection_diff(self._collection, collection, "the first workers", node.gateway.id)
        return text

    def schedule(self) -> None:
        """Deal the first tests, or those that a replacement can run."""
        if self._dealer is None and self._load.collection is None and self._needs:
            first, *others = self._load.node2collection.values()
            if all(other == first for other in others) and len(first) == len(self._needs):
                self._start(first)
        if self._dealer is None:
            self._load.schedule()
        else:
            self._deal()

    def _start(self, collection: list[str]) -> None:
        earlier = self._remembered
        tasks = [
            Task(tuple(bases), group, earlier.tests.get(nodeid))
            for nodeid, (bases, group) in zip(collection, self._needs, strict=True)
        ]
        self._collection = collection
        self._dealer = Dealer(tasks, earlier.loads, self._clock)
        for node in self._load.nodes:
            if node in self._load.node2collection:
                self._dealer.join(node)

    # --- tests --------------------------------------------------------------------------------------------------------

    @property
    def has_pending(self) -> bool:
        """Whether a test has not been completed."""
        if self._dealer is None:
            return bool(self._load.has_pending)
        return self._dealer.waiting or self._dealer.most_sent > 0

    @property
    def tests_finished(self) -> bool:
        """Whether each test has been completed, or is the last of its worker."""
        if self._dealer is None:
            return bool(self._load.tests_finished)
        return not self._dealer.waiting and self._dealer.most_sent < 2

    def note_report(self, report: pytest.TestReport) -> None:
        """Note the loads of a test, and whether it failed; its last report has all its properties."""
        node, test = getattr(report, "node", None), getattr(report, "item_index", None)
        if node is None or test is None:
            return
        loading, importing = (_seconds(report, name) for name in ("sway_load_seconds", "sway_import_seconds"))
        if loading or importing:
            self._overhead[node, test] = (loading, importing)
        if report.failed:
            self._failed.add(test)

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        """Note that a worker has completed a test, and deal the next."""
        if self._dealer is None:
            self._load.mark_test_complete(node, item_index, duration)
            return
        loading, importing = self._overhead.pop((node, item_index), (0.0, 0.0))
        seconds = self._dealer.done(node, item_index, max(0.0, duration - importing), loading)
        if item_index not in self._failed:
            nodeid = self._collection[item_index]
            self._remembered.tests.pop(nodeid, None)  # so that the newest are last
            self._remembered.tests[nodeid] = seconds
        self._deal()

    def mark_test_pending(self, item: str) -> None:
        """Run a test again whose worker crashed."""
        if self._dealer is None:
            self._load.mark_test_pending(item)
        else:
            self._dealer.again(self._collection.index(item))
            self._deal()

    def remove_pending_tests_from_node(self, node: Any, indices: Sequence[int]) -> None:
        """Tests that a worker has got are never taken back."""
        raise NotImplementedError

    def remove_node(self, node: Any) -> str | None:
        """Remove a worker, and return the test that it was running.

        Raises:
            KeyError: It was not added.
        """
        crashed: str | None = self._load.remove_node(node)
        if self._dealer is None or node not in self._dealer:
            return crashed
        test = self._dealer.leave(node)
        self._deal()
        return None if test is None else self._collection[test]

    def _deal(self) -> None:
        assert self._dealer is not None
        for node in self._load.nodes:
            if node in self._dealer and node.shutting_down:
                self._dealer.stop(node)
        for deal in self._dealer.deals():
            if deal.tests:
                deal.worker.send_runtest_some(list(deal.tests))
            if deal.last:
                deal.worker.shutdown()

    @property
    def learned(self) -> Remembered:
        """The durations of this run, and of earlier runs where this one has none."""
        loads = {} if self._dealer is None else self._dealer.loads
        return self._remembered._replace(loads={**self._remembered.loads, **loads})

    def remember(self) -> None:
        """Write the durations to pytest's cache, for the next run."""
        if self._dealer is not None:
            self.learned.write(self.config)


def _seconds(report: pytest.TestReport, name: str) -> float:
    """Return the sum of a report's properties with this name."""
    return sum(value for value in values_of(report.user_properties, name) if isinstance(value, float))


class Dealing:
    """The controller's hooks around the scheduler."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self.scheduling: SwayScheduling | None = None

    @pytest.hookimpl(trylast=True)  # after a conftest.py, and before pytest-xdist, which registers its own later
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> SwayScheduling:
        """Deal the tests by what they need."""
        self.scheduling = SwayScheduling(config, log)
        return self.scheduling

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Take the needs out of the node ids, before anything else sees them."""
        needs = take_needs(ids)
        if self.scheduling is not None and needs:
            self.scheduling.note_needs(needs)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how long a test's loads took; this comes before its worker says that the test is complete."""
        if self.scheduling is not None:
            self.scheduling.note_report(report)

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        """Write the durations for the next run."""
        if self.scheduling is not None:
            self.scheduling.remember()
