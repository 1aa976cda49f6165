"""`Comparison`: the difference between a candidate's and a baseline's scores, as numbers for a test to assert."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

from pytest_sway.comparison.questions import Questions, beginning
from pytest_sway.comparison.statistics import POWER, Evidence, PairedProportions, evidence_of
from pytest_sway.errors import ComparisonError

__tracebackhide__ = True

_WORST: Final = 5
_MIRRORED: Final = str.maketrans("<>", "><")


class Row(NamedTuple):
    """One question of a comparison.

    Attributes:
        question: The question, as the test passed it.
        candidate: Its score on the candidate.
        baseline: Its score on the baseline.
    """

    question: Any
    candidate: float
    baseline: float

    @property
    def difference(self) -> float:
        """Return how much more the candidate scores."""
        return self.candidate - self.baseline


class Claim(NamedTuple):
    """A claim that the true mean difference is above (``>``) or below (``<``) a margin."""

    op: str
    margin: float

    def __str__(self) -> str:
        return f"{'over' if self.op == '>' else 'under'} {self.margin:.4g}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Comparison:
    """The mean difference of a candidate's scores from a baseline's, over the prompts, and its confidence interval.

    Assert one of its bounds. ``low > -0.1`` passes if the candidate is shown to lose less than 0.1. ``high >= 0``
    passes unless the candidate is shown to be worse.

    Attributes:
        name: Its name in reports.
        candidate: The candidate's name.
        baseline: The baseline's name.
        unit: The unit of the numbers, such as ``nats an answer``.
        mean: The mean difference.
        low: The interval's lower bound.
        high: The interval's upper bound.
        n: The number of different prompts; questions with equal prompts count as one.
        confidence: The confidence level of the interval.
        rows: Every question with both scores, in the order of the questions.
        drift: How much more the base scores now than when the baseline was recorded, as a mean over the prompts.
            ``None`` if you pass a baseline, or if the candidate has no base.
    """

    name: str
    candidate: str
    baseline: str
    unit: str
    mean: float
    low: float
    high: float
    n: int
    confidence: float
    rows: tuple[Row, ...]
    _evidence: Evidence = field(repr=False)
    drift: float | None = None

    @property
    def detectable(self) -> float:
        """Return the smallest shift that this many prompts detect with 80% power; infinity if they detect none."""
        return self._evidence.detectable(self.confidence)

    @property
    def p_value(self) -> float:
        """Return the two-sided p-value of no difference: below ``1 - confidence`` if the interval excludes 0."""
        return self._evidence.p_value()

    @property
    def against_0(self) -> str:
        """Return the claim that the difference is not 0, on the mean's side, and its verdict."""
        if self.low == 0.0 == self.high:
            return "exactly 0"
        claim = Claim(">" if self.mean >= 0.0 else "<", 0.0)
        return f"{claim}: {self.verdict(claim)}"

    def needed(self, margin: float) -> int:
        """Return about how many such prompts detect a shift of ``margin`` with 80% power.

        The same number shows that a candidate as good as the baseline loses less than ``margin``.

        Raises:
            ComparisonError: ``margin`` is not above 0.
        """
        if not 0.0 < margin < math.inf:
            raise ComparisonError(f"needed(margin) takes a shift above 0, such as 0.1; found {margin!r}.")
        return self._evidence.needed(margin, self.confidence)

    def __bool__(self) -> NoReturn:
        """Refuse: a comparison is neither true nor false."""
        raise TypeError(
            "a Comparison is neither true nor false: assert one of its numbers, such as"
            f" sway_compare(...).low > -0.1. This one is {self!r}."
        )

    def __repr__(self) -> str:
        return (
            f"<Comparison {self.name!r}: mean {self.mean:+.4g}, {100 * self.confidence:.4g}% interval {self.low:+.4g}"
            f" to {self.high:+.4g} {self.unit}, {self.n} prompts>"
        )

    def report(self, claim: Claim | None = None) -> Iterator[str]:
        """Yield the lines that a failing test shows: the interval, how many prompts it takes, the worst questions.

        Args:
            claim: What the test asserted, if known.
        """
        yield f"{self.name}: {self.candidate} - {self.baseline} = {self.mean:+.4g} {self.unit}"
        yield f"{100 * self.confidence:.4g}% interval {self.low:+.4g} to {self.high:+.4g}, {self.n} prompts"
        if claim is not None:
            yield f"{claim}: {self.verdict(claim)}"
        if self.drift is not None:
            yield f"the base itself has moved by {self.drift:+.4g} since it was recorded"
        yield from self._prompts_needed()
        worst = sorted(self.rows, key=lambda row: row.difference)[:_WORST]
        yield f"the worst {len(worst)} of {len(self.rows)}:"
        yield f"{'difference':>10}  {'candidate':>10}  {'baseline':>10}  question"
        for row in worst:
            numbers = (row.difference, row.candidate, row.baseline)
            yield "  ".join([*(f"{number:10.4g}" for number in numbers), beginning(row.question)])

    def verdict(self, claim: Claim) -> str:
        """Return whether the interval shows or refutes a claim; if undecided, add how many prompts would decide."""
        if claim.op == ">":
            shown, refuted = self.low > claim.margin, self.high <= claim.margin
        else:
            shown, refuted = self.high < claim.margin, self.low >= claim.margin
        if shown or refuted:
            return "shown" if shown else "refuted"
        distance = abs(self.mean - claim.margin)
        return f"undecided, needs about {_about(self.needed(distance))} prompts" if distance else "undecided"

    def claim(self, op: str, left: object, right: object) -> Claim | None:
        """Return the claim in ``left op right`` if one of the two operands is a bound of this interval."""
        if right is self.low or right is self.high:
            left, right, op = right, left, op.translate(_MIRRORED)
        if not (left is self.low or left is self.high) or op[:1] not in ("<", ">"):
            return None
        if isinstance(right, bool) or not isinstance(right, int | float):
            return None
        try:
            margin = float(right)
        except OverflowError:
            return None
        return Claim(op[0], margin) if math.isfinite(margin) else None

    def _prompts_needed(self) -> Iterator[str]:
        detectable = self.detectable
        if detectable == 0.0:
            return
        if math.isinf(detectable):
            least = self._evidence.needed(math.inf, self.confidence)
            yield f"so few prompts detect no shift; it takes at least {least} for {POWER:.0%} power"
            return
        half = f"half of it takes about {_about(self.needed(detectable / 2))} prompts"
        yield f"this many prompts detect a shift of {detectable:.4g} with {POWER:.0%} power; {half}"
        if self.mean != 0.0 and self.low <= 0.0 <= self.high:
            yield f"a shift as large as this mean takes about {_about(self.needed(abs(self.mean)))} prompts"


def compare(
    questions: Questions,
    candidate: tuple[str, Sequence[float]],
    baseline: tuple[str, Sequence[float]],
    *,
    confidence: float,
    name: str | None = None,
    same: bool = False,
    drift: float | None = None,
    step: float = 0.0,
) -> Comparison:
    """Return the comparison of two sides' scores.

    Args:
        questions: The questions.
        candidate: The candidate's name and its score of each question.
        baseline: The baseline's name and its score of each question.
        confidence: The confidence level of the interval.
        name: The comparison's name; by default made of the two sides' names.
        same: Whether both sides are one model, so that the difference is known to be 0.
        drift: How much more the base scores now than when the baseline was recorded.
        step: What the scores are rounded to; 0 if they are not.
    """
    rows = tuple(map(Row, questions.asked, candidate[1], baseline[1]))
    clusters = questions.clusters()
    evidence: Evidence
    scores = {score for row in rows for score in (row.candidate, row.baseline)}
    if not same and scores <= {0.0, 1.0} and not questions.in_nats:
        evidence = PairedProportions(
            math.fsum(_mean([row.difference > 0 for row in group]) for group in _grouped(rows, clusters)),
            math.fsum(_mean([row.difference < 0 for row in group]) for group in _grouped(rows, clusters)),
            len(clusters),
        )
    else:
        evidence = evidence_of([_mean([row.difference for row in group]) for group in _grouped(rows, clusters)], step)
    # Adding 0 makes objects of this comparison's own, by which `Comparison.claim` knows them.
    mean, low, high = (number + 0.0 for number in evidence.interval(confidence))
    return Comparison(
        name or f"{candidate[0]} against {baseline[0]}",
        candidate[0],
        baseline[0],
        questions.unit,
        mean,
        low,
        high,
        len(clusters),
        confidence,
        rows,
        evidence,
        drift,
    )


def _grouped(rows: Sequence[Row], clusters: Sequence[Sequence[int]]) -> Iterator[list[Row]]:
    return ([rows[at] for at in cluster] for cluster in clusters)


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _about(count: int) -> int:
    """Round a count up to two significant digits."""
    unit: int = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit
