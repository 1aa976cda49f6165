"""The order of tests, and their groups, which xdist's own scheduler distributes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xdist.remote import Producer  # type: ignore[import-untyped]
from xdist.scheduler import LoadGroupScheduling  # type: ignore[import-untyped]

from pytest_sway.run.scheduling import Needs, dealt, needs_of, ordered
from pytest_sway.spec.model_spec import ModelSpec


def needs(text: str) -> Needs | None:
    """Return the needs of ``a``, ``a+x`` or, for two specs, ``a+x b``; ``-`` means unknown needs."""
    if text == "-":
        return None
    specs = tuple(text.split())
    return Needs(tuple(spec.partition("+")[0] for spec in specs), specs)


def order_of(*texts: str) -> str:
    """Return the tests' numbers in the order in which they run."""
    return " ".join(map(str, ordered([needs(text) for text in texts])))


# --- order ------------------------------------------------------------------------------------------------------------


def test_equal_bases_stand_together_where_the_first_of_them_stood() -> None:
    assert order_of("b", "a", "b", "a") == "0 2 1 3"


def test_equal_adapters_stand_together_among_those_of_their_base() -> None:
    assert order_of("a+y", "b+x", "a+x", "a+y", "b+x", "a+x") == "0 3 2 5 1 4"


def test_among_equal_models_the_order_stays() -> None:
    assert order_of("a+x", "a+x", "a+x") == "0 1 2"


def test_tests_of_unknown_needs_keep_their_order_and_their_predecessors() -> None:
    assert order_of("-", "a", "-", "b", "a", "-") == "0 1 4 2 3 5"


def test_a_test_of_two_bases_runs_with_those_of_its_first() -> None:
    assert order_of("a", "a b", "b", "a", "b a") == "0 3 1 2 4"


@given(st.lists(st.sampled_from(["-", "a+x", "a+y", "a", "b+x", "b", "a b", "c+z a"]), max_size=30))
def test_ordering_is_a_permutation_and_a_second_time_changes_nothing(texts: list[str]) -> None:
    tests = [needs(text) for text in texts]
    order = ordered(tests)
    assert sorted(order) == list(range(len(tests)))
    assert ordered([tests[position] for position in order]) == list(range(len(tests)))


# --- what a test needs ------------------------------------------------------------------------------------------------


def test_the_needs_of_no_specs_are_not_known() -> None:
    assert needs_of([]) is None


def test_a_base_that_an_adapter_names_is_known_as_that_adapters() -> None:
    specs = [ModelSpec(adapter=adapter) for adapter in ("/x", "/y", "/x")]
    first, second, again = (needs_of([spec]) for spec in specs)
    assert first == again != second


def test_adapters_of_one_base_need_one_base() -> None:
    first, second = (needs_of([ModelSpec(base="org/a", adapter=adapter)]) for adapter in ("/x", "/y"))
    assert first is not None
    assert second is not None
    assert first.bases == second.bases
    assert first.specs != second.specs


@pytest.mark.parametrize("field", [{"dtype": "bf16"}, {"device": "cuda:1"}, {"revision": "v2"}, {"kind": "dummy"}])
def test_what_changes_the_loaded_base_makes_another_base(field: dict[str, Any]) -> None:
    assert needs_of([ModelSpec(base="org/a")]) != needs_of([ModelSpec(**{"base": "org/a", **field})])


def test_trust_in_remote_code_makes_no_other_base() -> None:
    assert needs_of([ModelSpec(base="org/a")]) == needs_of([ModelSpec(base="org/a", trust_remote_code=True)])


def test_auto_is_what_the_settings_say() -> None:
    auto = needs_of([ModelSpec(base="org/a")], device="cuda:1", dtype="bf16")
    assert auto == needs_of([ModelSpec(base="org/a", device="cuda:1", dtype="bf16")])


def test_a_whole_fine_tuned_model_is_a_second_base() -> None:
    pair = needs_of([ModelSpec(base="org/a", finetuned="org/b")])
    alone = [needs_of([ModelSpec(base=base)]) for base in ("org/a", "org/b")]
    assert pair is not None
    assert pair.bases == tuple(base for one in alone if one is not None for base in one.bases)


# --- groups -----------------------------------------------------------------------------------------------------------


def base_loads(tests: Sequence[Needs | None], groups: Sequence[int | None]) -> Counter[Hashable]:
    """Return how often each base is loaded if each group runs in a process of its own."""
    pairs = {(base, group) for needs, group in zip(tests, groups, strict=True) if needs for base in needs.bases}
    return Counter(base for base, _ in pairs)


def test_whole_bases_are_dealt_out_where_they_balance() -> None:
    tests = [needs(text) for text in "aaaaabbbbbbccccccddddd"]
    groups = dealt(tests, 2)
    assert base_loads(tests, groups) == Counter("abcd")
    assert Counter(groups) == {0: 11, 1: 11}


def test_a_base_is_cut_where_the_shares_would_be_too_uneven() -> None:
    tests = [needs(text) for text in "aaaaaaaab"]
    assert base_loads(tests, dealt(tests, 2)) == {"a": 2, "b": 1}


def test_a_slightly_uneven_share_is_better_than_one_more_load() -> None:
    tests = [needs(text) for text in "aaaaaabbbbb"]
    assert base_loads(tests, dealt(tests, 2)) == {"a": 1, "b": 1}


def test_a_cut_base_is_cut_once_in_the_order_of_its_tests() -> None:
    assert dealt([needs("a")] * 4, 2) == [0, 0, 1, 1]


def test_tests_whose_needs_are_not_known_get_no_group() -> None:
    assert dealt([None, needs("a"), None], 2) == [None, 0, None]


def test_a_test_of_two_bases_costs_a_load_of_each() -> None:
    tests = [needs("a b"), needs("a")]
    assert base_loads(tests, [0, 0]) == {"a": 1, "b": 1}


# --- groups, as xdist deals them out ----------------------------------------------------------------------------------


class FakeNode:
    """A worker as xdist's scheduler sees it, which runs tests in the order in which it receives them."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.queue: list[int] = []
        self.ran: list[int] = []

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        self.queue += indices

    def shutdown(self) -> None:
        self.shutting_down = True

    def can_run(self) -> bool:
        """Whether a test can run; xdist's workers also wait until they know the next one."""
        return len(self.queue) > (0 if self.shutting_down else 1)


def run_under_xdist(
    groups: Sequence[int | None], workers: int, *, reorder: bool, chance: random.Random
) -> list[FakeNode]:
    """Let xdist's scheduler distribute tests with these groups to workers that finish them in any order."""
    config: Any = SimpleNamespace(
        getvalue=lambda name: {"tx": ["popen"] * workers}[name], option=SimpleNamespace(loadscopereorder=reorder)
    )
    scheduler = LoadGroupScheduling(config, Producer("quiet", enabled=False))
    nodes: list[Any] = [FakeNode(f"gw{number}") for number in range(workers)]
    suffixes = ["" if group is None else f"@pytest-sway-{group}" for group in groups]
    for node in nodes:
        scheduler.add_node(node)
    for node in nodes:
        scheduler.add_node_collection(node, [f"test_x.py::test_{n}{suffix}" for n, suffix in enumerate(suffixes)])
    scheduler.schedule()
    while ready := [node for node in nodes if node.can_run()]:
        node = chance.choice(ready)
        node.ran.append(node.queue.pop(0))
        scheduler.mark_test_complete(node, node.ran[-1])
    assert sorted(index for node in nodes for index in node.ran) == list(range(len(groups)))
    return nodes


def loads_of(ran: Sequence[int], tests: Sequence[Needs | None]) -> Iterator[str]:
    """Return the loads of a worker that keeps one base at a time."""
    loaded = None
    for index in ran:
        known = tests[index]
        if known is not None and known.bases[0] != loaded:
            loaded = known.bases[0]
            yield str(loaded)


@st.composite
def suites(draw: st.DrawFn) -> list[Needs | None]:
    """Draw up to 12 bases with up to four adapters each, with different numbers of tests, and other tests between."""
    tests: list[Needs | None] = []
    for base in range(draw(st.integers(1, 12))):
        size = draw(st.one_of(st.integers(1, 4), st.integers(1, 100)))
        adapters = draw(st.integers(1, 4))
        tests += [needs(f"base{base}+{n % adapters}") for n in range(size)]
    tests += [None] * draw(st.sampled_from([0, 0, 3, 40]))
    draw(st.randoms(use_true_random=False)).shuffle(tests)
    return tests


@settings(deadline=None)  # a busy machine may be slow
@given(suites(), st.integers(1, 8), st.booleans(), st.randoms(use_true_random=False))
def test_both_bounds_hold_under_xdists_own_scheduler(
    collected: list[Needs | None], workers: int, reorder: bool, chance: random.Random
) -> None:
    tests = [collected[position] for position in ordered(collected)]
    groups = dealt(tests, workers)
    nodes = run_under_xdist(groups, workers, reorder=reorder, chance=chance)
    known = [needs for needs in tests if needs is not None]
    distinct = {needs.bases[0] for needs in known}
    loads = [base for node in nodes for base in loads_of(node.ran, tests)]
    assert len(loads) <= len(distinct) + workers - 1
    shares = [sum(tests[index] is not None for index in node.ran) for node in nodes]
    sizes = Counter(group for group in groups if group is not None)
    # A queued group goes to the first free worker; xdist sends larger groups first.
    if None not in tests or (reorder and min(sizes.values()) > 1):
        whole_tests = -(-len(known) // workers)
        assert max(shares) <= max(1.2 * len(known) / workers, whole_tests)
