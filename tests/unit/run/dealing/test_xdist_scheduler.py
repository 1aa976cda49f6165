"""pytest-sway's scheduler for pytest-xdist: with fake workers, and simulated with a virtual clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sway.run.dealing.needs import Needed, take_needs, with_needs
from pytest_sway.run.dealing.xdist_scheduler import Dealing, SwayScheduling
from tests.simulator import Costs, Outcome, Work, by_hand, collected, simulate

# --- with fake workers, as in pytest-xdist's own tests of its schedulers ----------------------------------------------


class FakeNode:
    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.sent: list[int] = []
        self.shutting_down = False

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


class Reports:
    def __init__(self) -> None:
        self.all: list[pytest.CollectReport] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.all.append(report)


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def config(pytestconfig: pytest.Config, reports: Reports) -> Any:
    option = SimpleNamespace(loadscopereorder=True)
    return SimpleNamespace(
        getvalue=lambda _: ["popen"] * 2, getoption=lambda _: None, option=option, hook=reports, cache=None
    )


def ids_of(needs: str) -> list[str]:
    return [f"test_x.py::test_{number}" for number in range(len(needs))]


def needed(needs: str) -> list[Needed]:
    """Return the needs of one test for each letter; ``-`` means that they are not known."""
    return [([] if letter == "-" else [letter], None) for letter in needs]


def started(config: Any, needs: str) -> tuple[SwayScheduling, FakeNode, FakeNode]:
    scheduling, first, second = SwayScheduling(config), FakeNode("gw0"), FakeNode("gw1")
    for node in (first, second):
        scheduling.add_node(node)
        assert not scheduling.collection_is_completed
        scheduling.note_needs(needed(needs))
        scheduling.add_node_collection(node, ids_of(needs))
    assert scheduling.collection_is_completed
    assert not scheduling.has_pending
    scheduling.schedule()
    return scheduling, first, second


def test_each_worker_gets_the_tests_of_its_base(config: Any) -> None:
    scheduling, first, second = started(config, "ababab")
    assert scheduling.nodes == [first, second]
    assert (first.sent, second.sent) == ([0, 2], [1, 3])
    assert scheduling.has_pending
    scheduling.mark_test_complete(first, 0, 1.0)
    scheduling.mark_test_complete(second, 1, 1.0)
    assert (first.sent, second.sent) == ([0, 2, 4], [1, 3, 5])
    assert not scheduling.tests_finished
    scheduling.mark_test_complete(first, 2, 1.0)
    scheduling.mark_test_complete(second, 3, 1.0)
    assert scheduling.tests_finished
    assert first.shutting_down
    assert second.shutting_down
    scheduling.mark_test_complete(first, 4, 1.0)
    scheduling.mark_test_complete(second, 5, 1.0)
    assert not scheduling.has_pending
    assert scheduling.remove_node(first) is None
    assert scheduling.nodes == [second]


def test_without_known_bases_the_tests_are_dealt_as_by_load(config: Any) -> None:
    scheduling, first, second = SwayScheduling(config), FakeNode("gw0"), FakeNode("gw1")
    for node in (first, second):
        scheduling.add_node(node)
        scheduling.add_node_collection(node, ids_of("------"))
    scheduling.schedule()
    assert (first.sent, second.sent) == ([0, 1], [2, 3])
    scheduling.mark_test_complete(first, 0)
    assert first.sent == [0, 1, 4]
    assert scheduling.has_pending
    assert not scheduling.tests_finished
    assert scheduling.shared_loads is None
    scheduling.mark_test_pending(ids_of("------")[0])
    assert scheduling.remove_node(second) == ids_of("------")[2]


def test_different_collections_are_reported_and_nothing_runs(config: Any, reports: Reports) -> None:
    scheduling, first, second = SwayScheduling(config), FakeNode("gw0"), FakeNode("gw1")
    for node, collection in ((first, ["test_x.py::test_1"]), (second, ["test_x.py::test_2"])):
        scheduling.add_node(node)
        scheduling.note_needs(needed("a"))
        scheduling.add_node_collection(node, collection)
    scheduling.schedule()
    assert first.sent == second.sent == []
    assert scheduling.tests_finished
    (report,) = reports.all
    assert "Different tests were collected between gw0 and gw1" in str(report.longrepr)


def test_a_replacement_runs_what_the_crashed_worker_had(config: Any) -> None:
    scheduling, first, second = started(config, "aaabbb")
    assert scheduling.remove_node(first) == "test_x.py::test_0"
    third = FakeNode("gw2")
    scheduling.add_node(third)
    scheduling.add_node_collection(third, ids_of("aaabbb"))
    scheduling.schedule()
    assert third.sent == [1, 2]
    assert second.sent == [3, 4]


def test_a_replacement_with_other_tests_gets_none_and_is_reported(config: Any, reports: Reports) -> None:
    scheduling, first, _ = started(config, "aaabbb")
    scheduling.remove_node(first)
    third = FakeNode("gw2")
    scheduling.add_node(third)
    scheduling.add_node_collection(third, ["test_x.py::test_0"])
    scheduling.schedule()
    assert third.sent == []
    assert third.shutting_down
    (report,) = reports.all
    assert "Different tests were collected between the first workers and gw2" in str(report.longrepr)


def test_a_worker_that_crashed_before_it_had_tests_was_running_none(config: Any) -> None:
    scheduling, *_ = started(config, "ab")
    third = FakeNode("gw2")
    scheduling.add_node(third)
    assert scheduling.remove_node(third) is None


def test_an_unknown_worker_cannot_be_removed(config: Any) -> None:
    scheduling, *_ = started(config, "ab")
    with pytest.raises(KeyError):
        scheduling.remove_node(FakeNode("gw2"))


def test_a_fatal_test_runs_again_if_a_plugin_asks_for_it(config: Any) -> None:
    scheduling, first, second = started(config, "aaaabbbb")
    fatal = scheduling.remove_node(first)
    assert fatal == "test_x.py::test_0"
    scheduling.mark_test_pending(fatal)
    third = FakeNode("gw2")
    scheduling.add_node(third)
    scheduling.add_node_collection(third, ids_of("aaaabbbb"))
    scheduling.schedule()
    assert 0 in third.sent
    assert second.sent == [4, 5]


def test_a_worker_that_is_shutting_down_gets_nothing_more(config: Any) -> None:
    scheduling, first, second = started(config, "aaaaaabb")
    first.shutdown()  # after --maxfail, say
    scheduling.mark_test_complete(first, 0, 1.0)
    assert first.sent == [0, 1]
    scheduling.mark_test_complete(second, 6, 1.0)
    assert second.sent == [6, 7, 2]


# --- what workers tell the controller ---------------------------------------------------------------------------------


def test_needs_travel_as_the_last_node_id_and_are_taken_out() -> None:
    needs: list[Needed] = [(["a", "b"], None), ([], "mine")]
    ids = with_needs(["test_x.py::test_1", "test_x.py::test_2"], needs)
    assert take_needs(ids) == needs
    assert ids == ["test_x.py::test_1", "test_x.py::test_2"]


@pytest.mark.parametrize("ids", [[], ["test_x.py::test_1"]])
def test_node_ids_without_needs_stay(ids: list[str]) -> None:
    before = list(ids)
    assert take_needs(ids) == []
    assert ids == before


def test_the_hook_takes_the_needs_before_any_other_sees_the_node_ids(config: Any) -> None:
    dealing = Dealing(config)
    scheduling = dealing.pytest_xdist_make_scheduler(config, None)
    ids = with_needs(ids_of("ab"), needed("ab"))
    dealing.pytest_xdist_node_collection_finished(ids)
    assert ids == ids_of("ab")
    for name in ("gw0", "gw1"):
        node = FakeNode(name)
        scheduling.add_node(node)
        scheduling.add_node_collection(node, ids)
    scheduling.schedule()
    assert scheduling.shared_loads == 0


# --- durations --------------------------------------------------------------------------------------------------------


def report(node: FakeNode, test: int, *, failed: bool = False, loading: float = 0.0, importing: float = 0.0) -> Any:
    properties = [
        ("sway_load_seconds", loading),
        ("sway_import_seconds", importing),
        ("other", "text"),
        ("odd",),
        ("sway_load_seconds", "?"),
    ]
    return SimpleNamespace(node=node, item_index=test, user_properties=properties, failed=failed)


def test_loads_and_imports_are_no_part_of_what_is_remembered_of_a_test(config: Any) -> None:
    scheduling, first, _ = started(config, "ab")
    scheduling.note_report(report(first, 0, loading=3.0))
    scheduling.note_report(report(first, 0, loading=3.0, importing=6.0))
    scheduling.mark_test_complete(first, 0, 10.0)
    assert scheduling.learned == ({"test_x.py::test_0": 1.0}, {"a": 3.0})


def test_a_failed_test_leaves_the_duration_of_an_earlier_run(config: Any) -> None:
    scheduling, first, second = started(config, "ab")
    scheduling.note_report(report(first, 0, failed=True))
    scheduling.mark_test_complete(first, 0, 0.1)
    scheduling.mark_test_complete(second, 1, 5.0)
    assert scheduling.learned.tests == {"test_x.py::test_1": 5.0}


def test_reports_from_elsewhere_are_ignored(config: Any) -> None:
    scheduling, *_ = started(config, "ab")
    scheduling.note_report(SimpleNamespace(user_properties=[], failed=True))  # type: ignore[arg-type] # of a crash


# --- simulated --------------------------------------------------------------------------------------------------------

COSTS = Costs(load=4.0, reply=0.002)
SUITES = {
    "equal": [("a", 24, 0.5), ("b", 24, 0.5), ("c", 24, 0.5), ("d", 24, 0.5)],
    "one with slow tests": [("a", 48, 2.5), *((base, 48, 0.5) for base in "bcdef")],
    "one with many tests": [("a", 240, 0.5), *((base, 48, 0.5) for base in "bcdef")],
}


def suite(name: str) -> list[Work]:
    return collected([Work((base,), seconds) for base, size, seconds in SUITES[name] for _ in range(size)])


def run_by_hand(tests: Sequence[Work], workers: int) -> Outcome:
    return simulate("loadgroup", tests, workers, COSTS, groups=by_hand(tests, workers, COSTS))


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
@pytest.mark.parametrize("name", SUITES)
def test_it_takes_as_long_as_the_best_groups_by_hand(name: str, workers: int) -> None:
    tests = suite(name)
    first = simulate("sway", tests, workers, COSTS)
    again = simulate("sway", tests, workers, COSTS, remembered=first.remembered)
    best = run_by_hand(tests, workers)
    assert first.wall <= 1.05 * best.wall
    assert again.wall <= 1.05 * best.wall


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
@pytest.mark.parametrize("name", SUITES)
def test_it_loads_at_most_what_groups_load_and_what_sharing_needs(name: str, workers: int) -> None:
    tests = suite(name)
    ours = simulate("sway", tests, workers, COSTS)
    assert ours.loads <= simulate("loadgroup", tests, workers, COSTS).loads + ours.shared_loads
    assert ours.loads == len(SUITES[name]) + ours.shared_loads


@pytest.mark.parametrize("dist", ["load", "loadgroup", "worksteal"])
@pytest.mark.parametrize("name", SUITES)
def test_it_is_never_slower_than_pytest_xdists_own(name: str, dist: str) -> None:
    tests = suite(name)
    for workers in (2, 4):
        assert simulate("sway", tests, workers, COSTS).wall <= 1.01 * simulate(dist, tests, workers, COSTS).wall


@st.composite
def suites(draw: st.DrawFn) -> list[Work]:
    needs = st.sampled_from([(), ("a",), ("a",), ("b",), ("c",), ("a", "b")])
    seconds = st.sampled_from([0.0, 0.01, 0.5, 0.5, 30.0])
    groups = st.sampled_from([None, None, None, "mine"])
    work = st.builds(lambda bases, secs, group: Work(bases, secs, group=group), needs, seconds, groups)
    return draw(st.lists(work, max_size=40))


@settings(deadline=None, max_examples=60)  # a busy machine may be slow
@given(suites(), st.integers(1, 5), st.sampled_from([0.0, 1.0, 100.0]), st.integers(0, 3), st.integers(0, 99))
def test_each_test_runs_once_even_if_workers_crash(
    tests: list[Work], workers: int, load: float, crashes: int, seed: int
) -> None:
    chance = random.Random(seed)
    fatal: list[int] = []

    def crashes_in(test: int) -> bool:
        if len(fatal) < crashes and chance.random() < 0.1:
            fatal.append(test)
            return True
        return False

    outcome = simulate("sway", tests, workers, Costs(load=load, reply=0.001), crashes=crashes_in)
    assert outcome.crashed == fatal
    assert sorted([*fatal, *(test for ran in outcome.ran.values() for test in ran)]) == list(range(len(tests)))
