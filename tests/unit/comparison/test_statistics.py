"""The intervals: known values, their level by simulation, and the number of questions that a shift needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pytest_sway.comparison.statistics import (
    EqualDifferences,
    Evidence,
    PairedMeans,
    PairedProportions,
    evidence_of,
    holm,
    mean_interval,
)

Sampler = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]

CENTRED: dict[str, Sampler] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(3, shape),
    "skewed": lambda rng, shape: rng.gamma(4.0, size=shape) - 4.0,
    "very skewed": lambda rng, shape: rng.exponential(size=shape) - 1.0,
}
"""Differences whose true mean is 0. The skewness of the last two is 1 and 2: many losses are small, or gains large."""

SAMPLES = 20_000
NOMINAL = (0.005, 0.025)


@cache
def false_alarms(name: str, n: int, nominal: float) -> float:
    """Return how often the interval is below 0 though the true mean is 0, in multiples of ``nominal``."""
    differences = CENTRED[name](np.random.default_rng(n), (SAMPLES, n))
    _, _, high = mean_interval(differences, 1 - 2 * nominal)
    return float((high < 0).mean()) / nominal


@pytest.mark.parametrize("nominal", NOMINAL)
@pytest.mark.parametrize("n", [5, 10, 20, 50])
@pytest.mark.parametrize("name", ["normal", "heavy-tailed"])
def test_the_level_holds_for_symmetric_differences(name: str, n: int, nominal: float) -> None:
    assert false_alarms(name, n, nominal) <= 1.3


@pytest.mark.parametrize("nominal", NOMINAL)
@pytest.mark.parametrize("n", [16, 20, 50])
@pytest.mark.parametrize("name", ["skewed", "very skewed"])
def test_the_level_holds_for_skewed_differences_from_16_on(name: str, n: int, nominal: float) -> None:
    assert false_alarms(name, n, nominal) <= 1.3


MOST = {
    ("skewed", 5, 0.005): 2.2,
    ("skewed", 5, 0.025): 1.5,
    ("skewed", 10, 0.005): 1.8,
    ("skewed", 10, 0.025): 1.3,
    ("very skewed", 5, 0.005): 6.0,
    ("very skewed", 5, 0.025): 2.5,
    ("very skewed", 10, 0.005): 2.6,
    ("very skewed", 10, 0.025): 1.3,
}
"""The most false alarms for few skewed differences, in multiples of the nominal ones."""


@pytest.mark.parametrize(("name", "n", "nominal"), MOST)
def test_few_skewed_differences_have_few_more_false_alarms(name: str, n: int, nominal: float) -> None:
    assert false_alarms(name, n, nominal) <= MOST[name, n, nominal]


def stated() -> dict[tuple[str, int, float], float]:
    """Return the false alarms in the table of the docs, by differences, number of prompts and nominal level."""
    page = (Path(__file__).parents[3] / "docs" / "pages" / "how-to" / "regression.md").read_text("utf-8")
    header = "| differences | at 0.5%: 5 prompts | 10 | 20 | 50 | at 2.5%: 5 prompts | 10 | 20 | 50 |\n"
    _, _, table = page.partition(header)
    assert table, f"the page has no table with the header {header}"
    columns = [(n, nominal) for nominal in NOMINAL for n in (5, 10, 20, 50)]
    found: dict[tuple[str, int, float], float] = {}
    for line in table.partition("\n\n")[0].splitlines()[1:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        shares = [float(cell.removesuffix("%")) / 100 for cell in cells]
        for column, share in zip(columns, shares, strict=True):
            found[(name.partition(" (")[0], *column)] = share
    return found


def test_the_docs_state_the_false_alarms_of_each_kind_of_differences() -> None:
    assert {name for name, _, _ in stated()} == set(CENTRED)


@pytest.mark.parametrize(("name", "n", "nominal"), list(stated()))
def test_the_false_alarms_are_those_that_the_docs_state(name: str, n: int, nominal: float) -> None:
    rounding = 0.0005  # the table has a tenth of a percent
    found = false_alarms(name, n, nominal) * nominal
    assert found == pytest.approx(stated()[name, n, nominal], rel=0.35, abs=rounding)


def test_students_interval_alone_would_not_hold() -> None:
    differences = CENTRED["very skewed"](np.random.default_rng(20), (SAMPLES, 20))
    mean, error = differences.mean(axis=1), differences.std(axis=1, ddof=1) / math.sqrt(20)
    assert (mean + 2.8609 * error < 0).mean() > 5 * 0.005  # the quantile of 99% with 19 degrees of freedom


def test_a_symmetric_sample_has_students_interval() -> None:
    interval = PairedMeans([-0.2, -0.1, 0.0, 0.1, 0.2]).interval(0.95)
    width = 2.7764451 * math.sqrt(0.025) / math.sqrt(5)  # from a table of t with 4 degrees of freedom
    assert interval == pytest.approx((0.0, -width, width), abs=1e-7)


def test_skewness_widens_the_side_of_the_long_tail_alone() -> None:
    lower = PairedMeans([-8.0, *[1.0 + step / 10 for step in range(20)]]).interval(0.95)
    assert lower.mean - lower.low > 1.2 * (lower.high - lower.mean)
    higher = PairedMeans([8.0, *[-1.0 - step / 10 for step in range(20)]]).interval(0.95)
    assert (higher.mean, higher.low, higher.high) == pytest.approx((-lower.mean, -lower.high, -lower.low))


def test_differences_that_are_all_0_have_no_width() -> None:
    nothing = evidence_of([0.0] * 7)
    assert nothing.interval(0.99) == (0.0, 0.0, 0.0)
    assert (nothing.p_value(), nothing.detectable(0.99), nothing.needed(0.001, 0.99)) == (1.0, 0.0, 2)


def test_two_differences_are_enough() -> None:
    interval = PairedMeans([0.0, 1.0]).interval(0.99)
    assert interval == pytest.approx((0.5, 0.5 - 63.6567 / 2, 0.5 + 63.6567 / 2), rel=1e-4)


# --- scores of 0 and 1 ------------------------------------------------------------------------------------------------


@cache
def _proportions(n: int, confidence: float) -> list[tuple[int, int, float, float]]:
    """Return every possible outcome of ``n`` questions, and its interval."""
    outcomes = [(gained, lost) for gained in range(n + 1) for lost in range(n + 1 - gained)]
    intervals = [PairedProportions(gained, lost, n).interval(confidence) for gained, lost in outcomes]
    return [(*outcome, each.low, each.high) for outcome, each in zip(outcomes, intervals, strict=True)]


def _false_alarms_of_proportions(n: int, nominal: float, true: float) -> Iterator[float]:
    """Return the largest exact probability of an interval below the true difference, over all shares of changes."""
    gained, lost, _, high = np.array(_proportions(n, 1 - 2 * nominal)).T
    kept = n - gained - lost
    ways = np.array(
        [math.lgamma(n + 1) - sum(math.lgamma(k + 1) for k in row) for row in zip(gained, lost, kept, strict=True)]
    )
    for changing in np.linspace(max(abs(true), 0.01), 0.99, 40):
        shares = ((changing + true) / 2, (changing - true) / 2, 1 - changing)
        logs = [np.where(count > 0, count * math.log(max(share, 1e-300)), 0.0) for count, share in
                zip((gained, lost, kept), shares, strict=True)]  # fmt: skip
        yield float(np.exp(ways + sum(logs))[high < true].sum())


@pytest.mark.parametrize("nominal", NOMINAL)
@pytest.mark.parametrize("n", [5, 10, 20, 50])
@pytest.mark.parametrize("true", [-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2])
def test_the_level_holds_for_scores_of_0_and_1(n: int, nominal: float, true: float) -> None:
    assert max(_false_alarms_of_proportions(n, nominal, true)) <= nominal


def test_equal_outcomes_have_a_width_at_5_questions() -> None:
    interval = PairedProportions(0, 0, 5).interval(0.99)
    # (5 d - 1)**2 = z**2 * 5 d (1 - d), with z = 2.575829
    assert interval == pytest.approx((0.0, -0.7182213, 0.7182213), abs=1e-6)


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(5, 0, 5), (0, 5, 5), (3, 1, 9), (0, 0, 2), (20, 20, 40), (1.5, 0.5, 4)]
)
def test_an_interval_of_proportions_holds_its_mean_and_mirrors(gained: float, lost: float, n: int) -> None:
    mean, low, high = PairedProportions(gained, lost, n).interval(0.99)
    assert -1.0 <= low < mean <= high <= 1.0 or -1.0 <= low <= mean < high <= 1.0
    assert PairedProportions(lost, gained, n).interval(0.99) == pytest.approx((-mean, -high, -low))


def test_without_the_correction_it_is_tangos_interval() -> None:
    """Fagerland, Lydersen and Laake (Statistics in Medicine 33, 2014) give -0.517 to -0.026 for 1 and 7 of 21."""
    assert _tango(1, 7, 21, 1.959964) == pytest.approx((-0.517, -0.026), abs=0.0006)
    _, low, high = PairedProportions(1, 7, 21).interval(0.95)
    assert low < -0.517 < -0.026 < high


def _tango(gained: int, lost: int, n: int, z: float) -> tuple[float, float]:
    """Compute the interval without correction, on a grid."""
    evidence = PairedProportions(gained, lost, n)
    grid = [step / 10_000 for step in range(-9_999, 10_000)]
    inside = [d for d in grid if abs(gained - lost - n * d) <= z * evidence._error(d)]
    return inside[0], inside[-1]


# --- differences that are all equal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [0.1, -0.3, 100.0])
@pytest.mark.parametrize("n", [2, 8, 9, 200])
def test_equal_differences_have_the_width_of_as_many_answers_gained(difference: float, n: int) -> None:
    mean, low, high = evidence_of([difference] * n).interval(0.99)
    gained = PairedProportions(n, 0, n).interval(0.99)
    assert mean == difference
    assert (high - mean, mean - low) == pytest.approx([abs(difference) * (1.0 - gained.low)] * 2)


@pytest.mark.parametrize("nominal", NOMINAL)
@pytest.mark.parametrize("n", range(2, 14))
def test_the_level_holds_for_equal_differences(n: int, nominal: float) -> None:
    """Each question is as likely to gain 1 as to lose 1, so that the true mean is 0."""
    lost = evidence_of([-1.0] * n).interval(1 - 2 * nominal).high < 0
    assert not lost or 0.5**n <= nominal


@pytest.mark.parametrize(
    "differences",
    [
        [0.6 - 0.4, 0.4 - 0.2, 0.3 - 0.1],
        [np.float32(0.3) - np.float32(0.1), 0.2],
        [0.3334, 0.3333],
        [0.01, 0.0101, 0.0099],
    ],
)
def test_differences_are_equal_if_only_rounding_tells_them_apart(differences: list[float]) -> None:
    assert isinstance(evidence_of(differences, step=1e-4), EqualDifferences)
    assert isinstance(evidence_of([*differences, 0.21], step=1e-4), PairedMeans)


def test_small_differences_are_not_equal_if_nothing_was_rounded() -> None:
    assert isinstance(evidence_of([0.00005, 0.00024] * 250), PairedMeans)


def test_tiny_differences_that_are_equal_but_for_rounding_are_equal() -> None:
    assert isinstance(evidence_of([1e-5 - 3e-5, 3e-5 - 5e-5]), EqualDifferences)
    assert isinstance(evidence_of([1e-5, 2e-5]), PairedMeans)


# --- power and sample size --------------------------------------------------------------------------------------------

SEEN: list[tuple[Evidence, int]] = [
    (PairedMeans([0.3, -0.1, 0.4, 0.0, 0.2, -0.3, 0.1, 0.25]), 8),
    (PairedProportions(4, 6, 60), 60),
    (EqualDifferences(-0.3, 20), 20),
]


@pytest.mark.parametrize(("evidence", "n"), SEEN, ids=["means", "proportions", "equal"])
def test_this_many_questions_detect_the_detectable_shift(evidence: Evidence, n: int) -> None:
    detectable = evidence.detectable(0.99)
    assert evidence.needed(detectable * 1.000001, 0.99) == n
    assert evidence.needed(detectable / 2, 0.99) > 2 * evidence.needed(detectable, 0.99)


def test_the_detectable_shift_of_means_has_a_power_of_80_percent() -> None:
    rng = np.random.default_rng(0)
    n = 50
    sample = PairedMeans(list(np.linspace(-1.0, 1.0, n)))
    spread = float(np.std(sample.differences, ddof=1))
    shifted = rng.standard_normal((SAMPLES, n)) * spread + sample.detectable(0.95)
    _, low, _ = mean_interval(shifted, 0.95)
    assert (low > 0).mean() == pytest.approx(0.8, abs=0.03)


def test_the_detectable_shift_of_proportions_has_a_power_of_at_least_80_percent() -> None:
    rng = np.random.default_rng(0)
    shift = PairedProportions(0, 0, 40).detectable(0.95)  # all changes are losses
    lost = rng.binomial(40, shift, 2_000)
    bounds = {count: PairedProportions(0, int(count), 40).interval(0.95).high for count in np.unique(lost)}
    assert 0.8 <= np.mean([bounds[count] < 0 for count in lost]) <= 0.95  # outcomes are whole numbers


def test_too_few_scores_of_0_and_1_detect_nothing() -> None:
    assert math.isinf(PairedProportions(0, 0, 5).detectable(0.99))
    assert PairedProportions(0, 0, 5).needed(1.0, 0.99) == 9


def test_the_number_of_needed_questions_has_a_bound() -> None:
    assert PairedMeans([0.0, 1.0, 5.0]).needed(1e-300, 0.99) == 10**9
    assert PairedProportions(1, 1, 10).needed(1e-9, 0.99) == 10**9


# --- p-values ---------------------------------------------------------------------------------------------------------


def _samples(name: str) -> Iterator[Evidence]:
    rng = np.random.default_rng(7)
    for n in (2, 5, 10, 30):
        for shift in (-1.0, -0.3, 0.0, 0.3, 1.0):
            yield PairedMeans([float(each) for each in CENTRED[name](rng, (1, n))[0] + shift])


def _excludes_0(evidence: Evidence, confidence: float) -> bool:
    interval = evidence.interval(confidence)
    return interval.low > 1e-11 or interval.high < -1e-11


@pytest.mark.parametrize("name", CENTRED)
def test_p_is_below_1_minus_the_confidence_exactly_if_the_interval_excludes_0(name: str) -> None:
    for evidence in _samples(name):
        p = evidence.p_value()
        for confidence in (0.5, 0.95, 0.99, 1 - p * 1.0001, 1 - p * 0.9999):
            if 0.0 < confidence < 1.0:
                assert _excludes_0(evidence, confidence) == (p < 1 - confidence)


@pytest.mark.parametrize("n", [2, 5, 21])
def test_p_of_proportions_agrees_with_their_interval(n: int) -> None:
    for gained, lost, _, _ in _proportions(n, 0.99):
        evidence = PairedProportions(gained, lost, n)
        p = evidence.p_value()
        for confidence in (0.8, 0.99, 1 - p * 1.0001, 1 - p * 0.9999):
            if 0.0 < confidence < 1.0:
                assert _excludes_0(evidence, confidence) == (p < 1 - confidence)


def test_p_of_proportions_is_mcnemars() -> None:
    """The square is (16 - 6 - 1)**2 / 22 = 3.682; chi-squared with one degree of freedom exceeds that in 5.50%."""
    assert PairedProportions(16, 6, 60).p_value() == pytest.approx(0.0550, abs=5e-5)


@pytest.mark.parametrize("n", [2, 7, 9, 40])
def test_p_of_equal_differences_agrees_with_their_interval(n: int) -> None:
    for difference in (0.1, -0.3):
        evidence = evidence_of([difference] * n)
        p = evidence.p_value()
        for confidence in (0.8, 0.99, 1 - p * 1.0001, 1 - p * 0.9999):
            if 0.0 < confidence < 1.0:
                assert _excludes_0(evidence, confidence) == (p < 1 - confidence)


def test_holms_p_grows_with_the_number_of_comparisons_and_keeps_their_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e60])
def test_an_interval_is_in_the_unit_of_the_differences(scale: float) -> None:
    differences = [0.5, -0.25, 1.5, 0.75, -1.0]
    one, other = PairedMeans(differences), PairedMeans([scale * each for each in differences])
    assert [each / scale for each in other.interval(0.99)] == pytest.approx(one.interval(0.99))
    assert other.p_value() == pytest.approx(one.p_value())


@pytest.mark.parametrize("n", [10, 20, 50, 200])
def test_as_many_questions_are_needed_as_detect_a_shift(n: int) -> None:
    for evidence in (PairedProportions(1.0, 2.0, n), PairedMeans([math.sin(k) for k in range(n)])):
        assert evidence.needed(evidence.detectable(0.95) * (1 + 1e-9), 0.95) == n
