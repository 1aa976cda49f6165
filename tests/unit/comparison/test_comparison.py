"""`Comparison`: its numbers and its report."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from pytest_sway.comparison.comparison import Comparison, compare
from pytest_sway.comparison.questions import Questions
from pytest_sway.errors import ComparisonError

PAIRS = [("a", " x"), ("a", " y"), ("b", " x"), ("c", " x"), ("d", " x")]
QUESTIONS = Questions(PAIRS)
GRADED = Questions(PAIRS, score=lambda view, questions: [1.0] * len(questions))


def made(candidate: list[float], baseline: list[float], questions: Questions = QUESTIONS, **options: Any) -> Comparison:
    return compare(questions, ("new", candidate), ("old", baseline), confidence=0.99, **options)


def test_equal_prompts_count_once() -> None:
    comparison = made([2.0, 4.0, 1.0, 1.0, 1.0], [0.0] * 5)
    assert (comparison.n, comparison.mean) == (4, 1.5)  # 3, 1, 1 and 1
    assert [row.difference for row in comparison.rows] == [2.0, 4.0, 1.0, 1.0, 1.0]


def test_scores_of_0_and_1_have_an_interval_of_proportions() -> None:
    comparison = made([1.0] * 5, [1.0] * 5, GRADED)
    assert comparison.mean == 0.0
    assert -1.0 < comparison.low < -0.5
    assert 0.5 < comparison.high < 1.0
    half = made([1.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 5, GRADED)
    assert half.mean == 0.125  # one of two questions of one of four prompts


def test_grades_that_all_fall_by_one_are_shown_to_be_worse_only_by_as_many_prompts_as_answers_lost() -> None:
    few = made([3.0, 4.0, 2.0, 5.0, 1.0], [4.0, 5.0, 3.0, 6.0, 2.0])
    assert (few.mean, few.low < -1.5, few.high > 0.0) == (-1.0, True, True)
    assert few.against_0 == "under 0: undecided, needs about 9 prompts"
    assert "so few prompts detect no shift; it takes at least 9 for 80% power" in list(few.report())
    many = Questions([f"text {n}" for n in range(12)])
    grades = [float(n % 5) for n in range(12)]
    found = compare(many, ("new", grades), ("old", [each + 100 for each in grades]), confidence=0.99)
    assert (found.mean, found.low < -150.0, -50.0 < found.high < 0.0) == (-100.0, True, True)


def test_one_model_on_both_sides_is_exactly_0_whatever_the_scores() -> None:
    for scores in ([1.0, 0.0, 1.0, 1.0, 0.0], [0.1, 0.2, 0.3, 0.4, 0.5]):
        itself = made(scores, scores, GRADED, same=True)
        assert (itself.mean, itself.low, itself.high, itself.detectable) == (0.0, 0.0, 0.0, 0.0)


def test_scores_in_nats_are_no_proportions() -> None:
    zeros = made([0.0] * 5, [0.0] * 5)
    assert (zeros.unit, zeros.low, zeros.high) == ("nats an answer", 0.0, 0.0)


def test_a_margin_that_is_no_float_is_no_claim() -> None:
    comparison = made([2.0, 4.0, 1.0, 1.0, 1.0], [0.0] * 5)
    assert comparison.claim(">", comparison.low, 10**400) is None
    assert str(comparison.claim(">", comparison.low, 1)) == "over 1"


def test_the_repr_is_one_line() -> None:
    comparison = made([2.0, 4.0, 1.0, 1.0, 1.0], [0.0] * 5, name="the town")
    assert repr(comparison) == (
        f"<Comparison 'the town': mean +1.5, 99% interval {comparison.low:+.4g} to {comparison.high:+.4g}"
        " nats an answer, 4 prompts>"
    )


def test_it_is_neither_true_nor_false() -> None:
    with pytest.raises(TypeError, match="assert one of its numbers, such as"):
        bool(made([0.0] * 5, [0.0] * 5))


def test_its_name_is_that_of_its_sides_by_default() -> None:
    assert made([0.0] * 5, [0.0] * 5).name == "new against old"


@pytest.mark.parametrize("margin", [0.0, -0.1, float("nan"), float("inf")])
def test_a_margin_is_above_0(margin: float) -> None:
    with pytest.raises(ComparisonError, match=r"needed\(margin\) takes a shift above 0, such as 0.1; found"):
        made([0.1, 0.2, 0.3, 0.4, 0.5], [0.0] * 5).needed(margin)


def test_as_many_prompts_are_needed_for_what_is_detectable() -> None:
    comparison = made([0.1, 0.2, 0.3, 0.4, 0.5], [0.0] * 5)
    assert comparison.needed(comparison.detectable * 1.000001) == comparison.n


def test_a_report_says_how_many_prompts_would_show_a_mean_that_is_undecided() -> None:
    comparison = made([0.5, -0.5, 0.3, -0.1, -0.4], [0.0] * 5)
    assert comparison.low < 0 < comparison.high
    assert comparison.needed(abs(comparison.mean)) == 393
    assert "a shift as large as this mean takes about 400 prompts" in list(comparison.report())


def test_a_report_says_that_so_few_scores_of_0_and_1_show_nothing() -> None:
    lines = list(made([1.0] * 5, [1.0] * 5, GRADED).report())
    assert "so few prompts detect no shift; it takes at least 9 for 80% power" in lines


def test_a_report_shows_the_worst_first_and_long_questions_by_their_beginning() -> None:
    questions = Questions([f"{n} {'word ' * 30}\nend" for n in range(8)])
    scores = [float(n % 5) for n in range(8)]
    *_, header, first, second, _, _, last = compare(
        questions, ("new", scores), ("old", [4.0] * 8), confidence=0.95
    ).report()
    assert header.split() == ["difference", "candidate", "baseline", "question"]
    assert first == f"        -4           0           4  0 {'word ' * 11}..."
    assert second.split()[3] == "5"
    assert last.split()[:4] == ["-2", "2", "4", "2"]


def test_a_report_has_no_character_that_a_terminal_obeys() -> None:
    questions = Questions(["\x1b[31mred", "\x9bcsi \u2028 line", "bell\a"])
    lines = list(compare(questions, ("new", [1.0, 2.0, 4.0]), ("old", [0.0] * 3), confidence=0.95).report())
    assert [line.split("  ")[-1] for line in lines[-3:]] == [r"\x1b[31mred", r"\x9bcsi line", r"bell\x07"]


def test_it_survives_a_pickle() -> None:
    comparison = made([0.1, 0.2, 0.3, 0.4, 0.5], [0.0] * 5)
    assert repr(pickle.loads(pickle.dumps(comparison))) == repr(comparison)
