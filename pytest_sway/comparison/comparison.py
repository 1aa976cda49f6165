"""`Comparison`: what a candidate scores beside a baseline, as plain numbers for a test to assert."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

from pytest_sway.comparison.questions import Questions, beginning
from pytest_sway.comparison.statistics import POWER, Evidence, PairedMeans, PairedProportions
from pytest_sway.errors import ComparisonError

__tracebackhide__ = True

_WORST: Final = 5
_MIRRORED: Final = str.maketrans("<>", "><")


class Row(NamedTuple):
    """One question of a comparison.

    Attributes:
        question: It, as it was asked.
        candidate: Its score on the candidate.
        baseline: Its score on the baseline.
    """

    question: Any
    candidate: float
    baseline: float

    @property
    def difference(self) -> float:
        """How much more the candidate scores."""
        return self.candidate - self.baseline


class Claim(NamedTuple):
    """That the true mean difference is above (``>``) or below (``<``) a margin."""

    op: str
    margin: float

    def __str__(self) -> str:
        return f"{'over' if self.op == '>' else 'under'} {self.margin:.4g}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Comparison:
    """How much more a candidate scores than a baseline: the mean over the prompts, and a confidence interval for it.

    Assert one of its bounds. ``low > -0.1``: it is shown to lose less than 0.1. ``high >= 0``: it is not shown to be
    worse.

    Attributes:
        name: What it is called in reports.
        candidate: The candidate's name.
        baseline: The baseline's name.
        unit: What the numbers are, such as ``nats an answer``.
        mean: The mean difference.
        low: The interval's lower bound.
        high: The interval's upper bound.
        n: How many different prompts there are; questions with equal prompts count as one.
        confidence: How probable it is that such an interval holds the true mean difference.
        rows: Every question with both scores, in the order in which they were asked.
        drift: How much more the base scores now than when the baseline was recorded, in the mean over the prompts;
            ``None`` where the baseline is scored now, or where no base stands beside the candidate.
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
        """The smallest shift that as many such prompts would show with 80% power; infinite where they show none."""
        return self._evidence.detectable(self.confidence)

    @property
    def p_value(self) -> float:
        """The two-sided p of a true mean difference of 0, for reports: under ``1 - confidence`` as 0 is outside."""
        return self._evidence.p_value()

    @property
    def against_0(self) -> str:
        """What the interval says of a difference from 0."""
        if self.low == 0.0 == self.high:
            return "exactly 0"
        claim = Claim(">" if self.mean >= 0.0 else "<", 0.0)
        return f"{claim}: {self.verdict(claim)}"

    def needed(self, margin: float) -> int:
        """Return about how many such prompts show a shift of ``margin`` with 80% power.

        As many show, of a candidate that is exactly as good as the baseline, that it loses less than ``margin``.

        Raises:
            ComparisonError: ``margin`` is not above 0.
        """
        if not 0.0 < margin < math.inf:
            raise ComparisonError(f"needed(margin) takes a shift above 0, such as 0.1; found {margin!r}.")
        return self._evidence.needed(margin, self.confidence)

    def __bool__(self) -> NoReturn:
        """A comparison is neither true nor false."""
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
        """The lines that a failing test shows: the interval, how many prompts would do, and the worst questions.

        Args:
            claim: What the test has asserted, if that is known.
        """
        yield f"{self.name}: {self.candidate} - {self.baseline} = {self.mean:+.4g} {self.unit}"
        yield f"{100 * self.confidence:.4g}% interval {self.low:+.4g} to {self.high:+.4g}, {self.n} prompts"
        if claim is not None:
            yield f"{claim}: {self.verdict(claim)}"
        if self.drift is not None:
            yield f"the base itself scores {self.drift:+.4g} since it was recorded"
        yield from self._prompts_needed()
        worst = sorted(self.rows, key=lambda row: row.difference)[:_WORST]
        yield f"the worst {len(worst)} of {len(self.rows)}:"
        yield f"{'difference':>10}  {'candidate':>10}  {'baseline':>10}  question"
        for row in worst:
            numbers = (row.difference, row.candidate, row.baseline)
            yield "  ".join([*(f"{number:10.4g}" for number in numbers), beginning(row.question)])

    def verdict(self, claim: Claim) -> str:
        """Return what the interval says of a claim: shown, refuted, or undecided and how many prompts would decide."""
        if claim.op == ">":
            shown, refuted = self.low > claim.margin, self.high <= claim.margin
        else:
            shown, refuted = self.high < claim.margin, self.low >= claim.margin
        if shown or refuted:
            return "shown" if shown else "refuted"
        distance = abs(self.mean - claim.margin)
        return f"undecided, needs about {_about(self.needed(distance))} prompts" if distance else "undecided"

    def claim(self, op: str, left: object, right: object) -> Claim | None:
        """Return what a comparison of two objects claims of this one, if one of the two is a bound of its interval."""
        if right is self.low or right is self.high:
            left, right, op = right, left, op.translate(_MIRRORED)
        if not (left is self.low or left is self.high) or op[:1] not in ("<", ">"):
            return None
        if isinstance(right, bool) or not isinstance(right, int | float) or not math.isfinite(right):
            return None
        return Claim(op[0], float(right))

    def claim_in(self, explanation: str) -> Claim | None:
        """Return what an assertion claims of this one that has passed.

        Args:
            explanation: pytest's, which begins with the two numbers that were compared.
        """
        left, op, right, *_ = [*explanation.partition("\n")[0].split(" "), "", "", ""]
        try:
            numbers = [float(left), float(right)]
        except ValueError:
            return None
        bounds = {self.high: self.high, self.low: self.low}
        return self.claim(op, *(bounds.get(number, number) for number in numbers))

    def _prompts_needed(self) -> Iterator[str]:
        detectable = self.detectable
        if detectable == 0.0:
            return
        if math.isinf(detectable):
            least = f"{self.needed(1.0)} are the least that could, with {POWER:.0%} power"
            yield f"so few prompts show no shift at all; {least}"
            return
        half = f"half of it takes about {_about(self.needed(detectable / 2))}"
        yield f"as many prompts show a shift of {detectable:.4g} with {POWER:.0%} power; {half}"
        if self.mean != 0.0 and self.low <= 0.0 <= self.high:
            yield f"one as large as the mean here takes about {_about(self.needed(abs(self.mean)))}"


def compare(
    questions: Questions,
    candidate: tuple[str, Sequence[float]],
    baseline: tuple[str, Sequence[float]],
    *,
    confidence: float,
    name: str | None = None,
    same: bool = False,
    drift: float | None = None,
) -> Comparison:
    """Return the comparison of two sides' scores.

    Args:
        questions: What was asked.
        candidate: The candidate's name and its score of each question.
        baseline: The same of the baseline.
        confidence: Of the interval.
        name: What the comparison is called; by default after its sides.
        same: Whether both sides are one model, so that the difference is known to be 0.
        drift: How much more the base scores now than when the baseline was recorded.
    """
    rows = tuple(map(Row, questions.asked, candidate[1], baseline[1]))
    clusters = questions.clusters()
    evidence: Evidence
    if not same and {score for row in rows for score in (row.candidate, row.baseline)} <= {0.0, 1.0}:
        evidence = PairedProportions(
            math.fsum(_mean([row.difference > 0 for row in group]) for group in _grouped(rows, clusters)),
            math.fsum(_mean([row.difference < 0 for row in group]) for group in _grouped(rows, clusters)),
            len(clusters),
        )
    else:
        evidence = PairedMeans([_mean([row.difference for row in group]) for group in _grouped(rows, clusters)])
    interval = evidence.interval(confidence)
    return Comparison(
        name or f"{candidate[0]} against {baseline[0]}",
        candidate[0],
        baseline[0],
        questions.unit,
        *interval,
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
    """A number that promises no more than two digits."""
    unit: int = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit
