from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from pytest_sway.backends.hf.scoring.batching import PrefixGroup, by_context, families, in_batches, worth_caching
from pytest_sway.backends.text.tokens import Window

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


def test_a_context_is_cached_where_it_is_long_for_what_follows_it() -> None:
    assert worth_caching(_windows(110, 3, 3), overhead=48)
    assert worth_caching(_windows(100, *[18] * 1000), overhead=48)
    assert not worth_caching(_windows(110, 3), overhead=48), "a single one shares with nobody"
    assert not worth_caching(_windows(90, 3, 3), overhead=48), "it saves less than two passes cost"
    assert not worth_caching(_windows(1, *[30] * 100), overhead=48), "texts that begin with BOS have no more in common"


def _families(sequences: list[list[int]], tokens: int = 1536) -> list[PrefixGroup]:
    return families(sequences, tokens=tokens, overhead=48)


def _behind(prefix: list[int], *lengths: int) -> list[list[int]]:
    """Return sequences with exactly the common prefix ``prefix``, in the order of their tokens."""
    return [[*prefix, *[n] * length] for n, length in enumerate(lengths)]


def test_sequences_that_begin_alike_are_a_family_wherever_they_stand() -> None:
    one, other = _behind([1] * 100, 2, 3), _behind([2] * 100, 1)
    assert _families([one[0], *other, one[1]]) == [PrefixGroup([0, 2], 100, 105), PrefixGroup([1], 101, 101)]


def test_each_is_alone_where_little_is_common_for_what_differs() -> None:
    def grouped(sequences: list[list[int]]) -> bool:
        return any(len(family.members) > 1 for family in _families(sequences))

    assert grouped(_behind([1] * 50, 2, 3))
    assert not grouped(_behind([1] * 48, 2, 3)), "it saves no more than it costs"
    assert not grouped(_behind([1] * 100, 250, 250)), "attention to what differs would cost more than what it saves"
    assert not grouped(_behind([1], *[40] * 10)), "texts that begin with BOS have no more in common"


def test_a_prefix_that_only_some_of_a_group_share_is_stored_once_too() -> None:
    questions = [[*[1] * 300, *[question] * 20] for question in (2, 3)]
    sequences = [ids for question in questions for ids in _behind(question, 5, 5, 5)]
    assert _families(sequences) == [PrefixGroup([0, 1, 2, 3, 4, 5], 300, 300 + 2 * (20 + 3 * 5))]


def test_a_beginning_is_in_common_with_those_only_that_have_it() -> None:
    sequences = _behind([1, *[2] * 200], 3, 3) + _behind([1, *[3] * 200], 3, 3)
    assert _families(sequences) == [PrefixGroup([0, 1], 201, 207), PrefixGroup([2, 3], 201, 207)]


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_families_are_within_the_budget_and_cost_less_than_each_alone(
    tails: list[list[int]], prefix: int, tokens: int
) -> None:
    sequences = [[7] * prefix + tail for tail in tails]
    found = families(sequences, tokens=tokens, overhead=3)
    assert sorted(i for family in found for i in family.members) == list(range(len(sequences)))
    for members, common, positions in found:
        beginnings = {tuple(sequences[i][:end]) for i in members for end in range(1, len(sequences[i]) + 1)}
        assert positions == len(beginnings)
        assert len({tuple(sequences[i][:common]) for i in members}) == 1
        if len(members) > 1:
            assert positions <= max(tokens, common + tokens // 2)
            assert positions + 3 < sum(len(sequences[i]) for i in members)


@given(st.integers(0, 300), st.integers(20, 200), st.integers(2, 8), st.integers(1, 31), st.integers(2, 8))
def test_what_all_prompts_begin_with_does_not_cost_what_the_completions_of_each_save(
    system: int, question: int, completions: int, length: int, prompts: int
) -> None:
    by_prompt = [
        [[*[1] * (1 + system), *[2 + p] * question, *[50 + n] * length] for n in range(completions)]
        for p in range(prompts)
    ]

    def cost(found: list[PrefixGroup]) -> int:
        return sum(family.cost + 48 * (len(family.members) > 1) for family in found)

    each_prompt_apart = sum(cost(_families(sequences)) for sequences in by_prompt)
    assert cost(_families([ids for sequences in by_prompt for ids in sequences])) <= each_prompt_apart


def test_those_with_most_in_common_become_a_family_first() -> None:
    cousin = [*[1] * 60, *[2] * 5]
    siblings = _behind([*[1] * 60, *[3] * 320], 20, 20)
    assert _families([cousin, *siblings]) == [PrefixGroup([0], 65, 65), PrefixGroup([1, 2], 380, 420)]


def test_a_prefix_of_very_many_texts_is_split_into_worthwhile_groups() -> None:
    sequences = [[*[1] * 100, *[2 + n] * 20] for n in range(2000)]
    found = _families(sequences)
    assert {len(family.members) for family in found} == {22, 2000 % 22}


def test_a_long_beginning_leaves_half_a_batch_to_what_follows_it() -> None:
    assert {len(family.members) for family in _families(_behind([1] * 1000, *[10] * 100), 768)} == {38, 24}
