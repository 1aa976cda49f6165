"""`Dealer`: which worker gets which tests, after any order of events."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sway.run.dealing.dealer import Dealer, Task


class Workers:
    """Workers that run what they get; a worker runs a test once it knows the next, or that there is none."""

    def __init__(self, *tasks: Task, loads: dict[str, float] | None = None) -> None:
        self.now = 0.0
        self.dealer: Dealer[str] = Dealer(tasks, loads or {}, lambda: self.now)
        self.queues: dict[str, list[int]] = {}
        self.clocks: dict[str, float] = {}
        self.ran: dict[str, list[int]] = defaultdict(list)
        self.last: set[str] = set()

    def join(self, *names: str) -> None:
        for name in names:
            self.queues[name] = []
            self.clocks[name] = self.now
            self.dealer.join(name)
        self.deal()

    def deal(self) -> None:
        for worker, tests, last in self.dealer.deals():
            assert worker not in self.last
            self.queues[worker] += tests
            if last:
                self.last.add(worker)

    def ready(self) -> list[str]:
        finished = not self.dealer.waiting and self.dealer.most_sent < 2
        return [name for name, queue in self.queues.items() if queue[1:] or (queue and (finished or name in self.last))]

    def run(self, name: str, seconds: float = 1.0, loading: float = 0.0) -> int:
        test = self.queues[name].pop(0)
        self.ran[name].append(test)
        self.clocks[name] += seconds
        self.now = max(self.now, self.clocks[name])
        self.dealer.done(name, test, seconds, loading)
        self.deal()
        return test

    def crash(self, name: str) -> int | None:
        queue = self.queues.pop(name)
        lost = self.dealer.leave(name)
        assert lost == (queue[0] if queue else None)
        self.deal()
        return lost

    def run_all(self, chance: random.Random | None = None) -> None:
        """Run what is left: tests of a second each, or in any order."""
        while ready := self.ready():
            self.run(chance.choice(ready) if chance else min(ready, key=lambda name: self.clocks[name]))


def tasks(text: str, seconds: float | None = None) -> list[Task]:
    """Return tests that need ``a``, or ``ab`` for two bases; ``-`` means that the needs are not known."""
    return [Task(() if word == "-" else tuple(word), None, seconds) for word in text.split()]


# --- which queue ------------------------------------------------------------------------------------------------------


def test_the_bases_with_the_most_tests_come_first() -> None:
    workers = Workers(*tasks("a b b b c c"))
    workers.join("w1", "w2")
    assert workers.queues == {"w1": [1, 2], "w2": [4, 5]}


def test_a_base_that_took_longer_in_an_earlier_run_comes_before_one_with_more_tests() -> None:
    workers = Workers(*tasks("a a a", seconds=1.0), *tasks("b b", seconds=9.0), *tasks("c c", seconds=4.0))
    workers.join("w1", "w2")
    assert workers.queues == {"w1": [3, 4], "w2": [5, 6]}


def test_a_worker_goes_on_with_its_base_until_it_has_no_more_tests() -> None:
    workers = Workers(*tasks("a b a b a b"))
    workers.join("w1", "w2")
    workers.run_all()
    assert sorted(workers.ran.values()) == [[0, 2, 4], [1, 3, 5]]


def test_tests_without_known_bases_fill_what_is_left() -> None:
    workers = Workers(*tasks("- - - - a a b b"))
    workers.join("w1", "w2")
    assert workers.queues == {"w1": [4, 5], "w2": [6, 7]}
    workers.run_all()
    assert sorted(workers.ran["w1"] + workers.ran["w2"]) == list(range(8))


def test_a_test_of_two_bases_runs_where_its_first_base_is() -> None:
    workers = Workers(*tasks("a a ab b b b"))
    workers.join("w1", "w2")
    workers.run_all()
    assert sorted(workers.ran.values()) == [[0, 1, 2], [3, 4, 5]]


# --- taking over ------------------------------------------------------------------------------------------------------


def test_workers_share_one_base_if_nothing_is_known_of_its_loads() -> None:
    workers = Workers(*tasks("a " * 12))
    workers.join("w1", "w2", "w3")
    workers.run_all()
    assert sorted(map(len, workers.ran.values())) == [4, 4, 4]
    assert workers.dealer.shared_loads == 2


def test_the_end_of_a_queue_is_taken_over_in_its_order() -> None:
    workers = Workers(*tasks("a " * 8))
    workers.join("w1", "w2")
    workers.run_all()
    assert sorted(workers.ran.values()) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_nothing_is_taken_over_if_a_load_takes_longer_than_the_wait() -> None:
    workers = Workers(*tasks("a " * 12, seconds=1.0), loads={"a": 60.0})
    workers.join("w1", "w2")
    workers.run_all()
    assert workers.ran == {"w1": list(range(12))}
    assert workers.dealer.shared_loads == 0


def test_a_worker_without_tests_takes_over_when_the_run_shows_that_it_pays() -> None:
    workers = Workers(*tasks("a " * 30, seconds=0.1), loads={"a": 4.0})
    workers.join("w1", "w2")
    assert workers.queues["w2"] == []
    workers.run("w1", seconds=0.2, loading=0.1)  # so a load takes 0.1 s, not 4.0
    assert workers.queues["w2"] != []
    assert workers.dealer.shared_loads == 1


def test_a_worker_that_has_the_base_takes_over_without_a_load() -> None:
    workers = Workers(*tasks("a " * 24), loads={"a": 1.0})
    workers.join("w1", "w2")
    for _ in range(8):
        workers.run("w2", seconds=0.1)
    workers.run_all()
    assert len(workers.ran["w2"]) > 12
    assert workers.dealer.shared_loads == 1


def test_a_worker_is_told_that_there_is_no_more_when_it_has_one_test_left() -> None:
    workers = Workers(*tasks("a b"))
    workers.join("w1", "w2")
    assert workers.last == {"w1", "w2"}
    assert sorted(workers.queues.values()) == [[0], [1]]


# --- how much at a time -----------------------------------------------------------------------------------------------


def test_a_worker_gets_more_at_a_time_if_tests_are_short() -> None:
    long = Workers(*tasks("a " * 99, seconds=2.0))
    short = Workers(*tasks("a " * 99, seconds=0.03))
    for workers in (long, short):
        workers.join("w1")
    assert len(long.queues["w1"]) == 2
    assert len(short.queues["w1"]) == 5


def test_a_group_goes_to_one_worker_at_once() -> None:
    grouped = [Task(("a",), "mine"), Task((), None), Task(("b",), "mine"), Task((), None), Task((), "mine")]
    workers = Workers(*grouped)
    workers.join("w1", "w2")
    assert workers.queues["w1"][:3] == [0, 2, 4]


# --- workers that come and go -----------------------------------------------------------------------------------------


def test_another_worker_runs_what_a_crashed_one_had_but_for_the_fatal_test() -> None:
    workers = Workers(*tasks("a a a b b b"))
    workers.join("w1", "w2")
    assert workers.crash("w1") == 0
    workers.join("w3")
    workers.run_all()
    assert sorted(workers.ran["w2"] + workers.ran["w3"]) == [1, 2, 3, 4, 5]


def test_a_fatal_test_runs_again_if_asked_to() -> None:
    workers = Workers(*tasks("a a a"))
    workers.join("w1")
    lost = workers.crash("w1")
    assert lost == 0
    workers.dealer.again(lost)
    workers.join("w2")
    workers.run_all()
    assert workers.ran["w2"] == [0, 1, 2]


def test_a_stopped_worker_gets_nothing_more_and_leaves_its_queue_to_others() -> None:
    workers = Workers(*tasks("a a a a b b b b"))
    workers.join("w1", "w2")
    workers.dealer.stop("w1")
    workers.last.add("w1")
    workers.run_all()
    assert workers.ran["w1"] == [0, 1]
    assert sorted(workers.ran["w2"]) == [2, 3, 4, 5, 6, 7]


def test_the_rest_of_a_group_stays_together_after_a_crash() -> None:
    workers = Workers(*[Task(("a",), "mine")] * 4, *tasks("b b"))
    workers.join("w1", "w2")
    assert workers.crash("w1") == 0
    workers.join("w3")
    workers.run_all()
    assert [1, 2, 3] in [[test for test in ran if test < 4] for ran in workers.ran.values()]


def test_an_unknown_worker_cannot_leave() -> None:
    with pytest.raises(KeyError):
        Dealer[str]([]).leave("w1")


# --- what a run learns ------------------------------------------------------------------------------------------------


def test_the_load_of_a_base_is_no_part_of_its_first_test() -> None:
    dealer: Dealer[str] = Dealer(tasks("a a"))
    dealer.join("w1")
    dealer.deals()
    assert dealer.done("w1", 0, seconds=5.0, loading=4.0) == 1.0
    assert dealer.loads == {"a": 4.0}


def test_the_load_of_a_further_adapter_is_part_of_its_test() -> None:
    dealer: Dealer[str] = Dealer(tasks("a a a"))
    dealer.join("w1")
    dealer.deals()
    dealer.done("w1", 0, seconds=5.0, loading=4.0)
    assert dealer.done("w1", 1, seconds=1.2, loading=0.2) == 1.2
    assert dealer.loads == {"a": 4.0}


# --- any order of events ----------------------------------------------------------------------------------------------

NEEDS = st.sampled_from([(), ("a",), ("a",), ("b",), ("c",), ("a", "b"), ("c", "a")])
SECONDS = st.one_of(st.none(), st.sampled_from([0.0, 0.001, 1.0, 1.0, 50.0]))
LOADS = st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.0, 0.1, 10.0, 1e6]))


@st.composite
def suites(draw: st.DrawFn) -> list[Task]:
    groups = st.sampled_from([None, None, None, None, "g", "h"])
    return draw(st.lists(st.builds(Task, NEEDS, groups, SECONDS), max_size=40))


@settings(deadline=None, max_examples=60)  # a busy machine may be slow
@given(suites(), LOADS, st.integers(1, 5), st.randoms(use_true_random=False), st.integers(0, 4))
def test_each_test_runs_once_whatever_happens(
    suite: Sequence[Task], loads: dict[str, float], count: int, chance: random.Random, crashes: int
) -> None:
    workers = Workers(*suite, loads=loads)
    names = iter(range(100))
    workers.join(*[f"w{next(names)}" for _ in range(count)])
    fatal: list[int] = []
    while ready := workers.ready():
        name = chance.choice(ready)
        if len(fatal) < crashes and chance.random() < 0.1:
            lost = workers.crash(name)
            assert lost is not None
            fatal.append(lost)
            workers.join(f"w{next(names)}")
        else:
            workers.run(name, chance.choice([0.0, 0.5, 20.0]), chance.choice([0.0, 0.4]))
    ran = [test for tests in workers.ran.values() for test in tests]
    assert sorted(ran + fatal) == list(range(len(suite)))


@settings(deadline=None, max_examples=30)
@given(suites(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_group_stays_together_in_its_order(suite: Sequence[Task], count: int, chance: random.Random) -> None:
    workers = Workers(*suite)
    workers.join(*[f"w{number}" for number in range(count)])
    workers.run_all(chance)
    for group in "gh":
        members = [test for test, task in enumerate(suite) if task.group == group]
        shares = [[test for test in ran if suite[test].group == group] for ran in workers.ran.values()]
        assert not members or members in shares


@settings(deadline=None, max_examples=30)
@given(suites(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_no_worker_loads_a_base_that_another_has_if_loads_take_longer_than_all_tests(
    suite: Sequence[Task], count: int, chance: random.Random
) -> None:
    single = [Task(task.bases[:1], None, task.seconds) for task in suite]
    workers = Workers(*single, loads=dict.fromkeys("abc", 1e9))
    workers.join(*[f"w{number}" for number in range(count)])
    workers.run_all(chance)
    loaded = [{base for test in ran for base in single[test].bases} for ran in workers.ran.values()]
    assert sum(map(len, loaded)) == len({base for task in single for base in task.bases})
