from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from pytest_sway.backends.hf.batches import CPU, by_context, families, in_batches, parted, positions, worth_sharing
from pytest_sway.backends.hf.tokenisation import Window

LENGTHS = st.lists(st.integers(1, 40), max_size=9)


def _cost(lengths: list[int], batches: list[list[int]], overhead: int) -> int:
    return sum(overhead + len(batch) * max(lengths[i] for i in batch) for batch in batches)


@given(LENGTHS, st.integers(1, 100), st.integers(0, 60))
def test_each_sequence_is_in_one_batch_and_no_batch_is_over_the_budget(
    lengths: list[int], tokens: int, overhead: int
) -> None:
    batches = in_batches(lengths, tokens=tokens, overhead=overhead)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens for batch in batches)


@given(LENGTHS, st.integers(0, 60))
def test_no_other_way_to_cut_the_sorted_lengths_costs_less(lengths: list[int], overhead: int) -> None:
    found = _cost(lengths, in_batches(lengths, tokens=10_000, overhead=overhead), overhead)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for cuts in range(len(order)):
        for places in combinations(range(1, len(order)), cuts):
            edges = [0, *places, len(order)]
            others = [order[a:b] for a, b in pairwise(edges)]
            assert found <= _cost(lengths, others, overhead)


@given(LENGTHS, st.integers(1, 100))
def test_sequences_that_are_not_padded_fill_each_batch_up(lengths: list[int], tokens: int) -> None:
    batches = in_batches(lengths, tokens=tokens, overhead=5, padded=False)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in batch) for batch in batches]
    assert all(len(batch) == 1 or total <= tokens for batch, total in zip(batches, sums, strict=True))
    for total, following in zip(sums, batches[1:], strict=False):
        assert total + lengths[following[0]] > tokens


def test_the_longest_come_first_so_that_what_does_not_fit_shows_at_once() -> None:
    assert in_batches([3, 90, 4, 80], tokens=100, overhead=10) == [[1], [3], [2, 0]]


def test_windows_are_grouped_by_what_they_are_conditioned_on() -> None:
    a, b, c = Window((1,), (2,)), Window((2,), (2,)), Window((1,), (3, 4))
    assert by_context([a, b, c]) == [[a, c], [b]]


def _windows(context: int, *scored: int) -> list[Window]:
    return [Window((1,) * context, (n,) * length) for n, length in enumerate(scored)]


def test_a_context_is_shared_where_it_is_long_for_what_follows_it() -> None:
    assert worth_sharing(_windows(100, 3, 3), overhead=48)
    assert not worth_sharing(_windows(100, 3), overhead=48), "a single one shares with nobody"
    assert not worth_sharing(_windows(10, 3, 3), overhead=48), "it saves less than it costs"
    assert worth_sharing(_windows(1, *[1] * 100), overhead=48)
    assert not worth_sharing(_windows(1, *[30] * 100), overhead=48), "texts that begin with BOS have no more in common"


def test_neighbours_of_one_context_are_a_family_in_the_windows_order() -> None:
    a, b, c = _windows(100, 2, 3), _windows(99, 1), _windows(5, 2, 2)
    assert families([*a, *b, *c], CPU) == [a, b, [c[0]], [c[1]]]
    assert families([a[0], *b, a[1]], CPU) == [[a[0]], b, [a[1]]]


@given(st.integers(1, 60), st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 80))
def test_windows_of_one_context_are_parted_within_the_budget_in_order(
    context: int, scored: list[int], tokens: int
) -> None:
    windows = _windows(context, *scored)
    parts = parted(windows, tokens)
    assert [window for part in parts for window in part] == windows
    assert all(len(part) == 1 or positions(part) <= max(tokens, context + tokens // 2) for part in parts)


def test_a_context_with_very_many_continuations_is_shared_in_parts_that_are_worth_it() -> None:
    windows = _windows(100, *[20] * 2000)
    assert not worth_sharing(windows, overhead=48), "all side by side would cost more than they save"
    parts = families(windows, CPU)
    assert all(worth_sharing(part, overhead=48) for part in parts)
    assert [window for part in parts for window in part] == windows
    assert sum(map(positions, parts)) < 1.3 * sum(len(window.scored) for window in windows)


def test_a_long_context_leaves_half_a_batch_to_what_follows_it() -> None:
    windows = _windows(1000, *[11] * 100)
    assert {len(part) for part in parted(windows, 768)} == {38, 24}
