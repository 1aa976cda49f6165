"""Recorded scores: what a candidate has scored once, to stand for a baseline that is gone.

A `Record` gives the scores of the questions of a test (`Record.rows_of`), if they are of the same score, unit and base.
`pytest_sway.comparison.record_file` makes a text of it, and of the text a record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.comparison.questions import POINTS, beginning
from pytest_sway.errors import RecordError
from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from pytest_sway.comparison.comparison import Comparison
    from pytest_sway.comparison.questions import Questions

__tracebackhide__ = True

DECIMALS: Final = 4
ANEW: Final = "To record anew, run the test with --sway-record, review the diff and commit it."


class Identity(NamedTuple):
    """A model, as it is known on every machine.

    Attributes:
        name: For people, and for models that have no files here.
        digest: Of its files, where there are some.
    """

    name: str
    digest: str | None = None

    def is_other_than(self, other: Identity) -> bool:
        """Whether two are not one model: by their files, or by their names where one of them has none."""
        if self.digest is None or other.digest is None:
            return self.name != other.name
        return self.digest != other.digest

    def __str__(self) -> str:
        return self.name if self.digest is None else f"{self.name} (digest {self.digest[:12]})"


class RecordedRow(NamedTuple):
    """The scores of one question.

    Attributes:
        digest: Of the question.
        base: The base's score; ``None`` where the candidate had no base beside it.
        tuned: The candidate's score.
        tokens: How many tokens the score is a mean over; ``None`` for a score that is none.
        question: Its beginning, for people.
    """

    digest: str
    base: float | None
    tuned: float
    tokens: int | None
    question: str


@dataclass(frozen=True, slots=True)
class Record:
    """What one comparison has recorded.

    Attributes:
        name: By which the test finds it again.
        unit: What one point of the scores is.
        score: What made the scores.
        base: The candidate's base, if that was scored too.
        candidate: What was recorded; for people.
        made_with: Device, dtype and versions; for people.
        rows: One for each question.
    """

    name: str
    unit: str
    score: str
    base: Identity | None
    candidate: Identity
    made_with: Mapping[str, str]
    rows: tuple[RecordedRow, ...]

    def rows_of(self, questions: Questions, where: str) -> list[RecordedRow]:
        """Return the row of each question, in their order.

        Args:
            questions: What is asked now. They are told how many tokens each had.
            where: What the file is called in errors.

        Raises:
            RecordError: They were scored otherwise, or one is new.
        """
        for what, then, now in (("score", self.score, questions.score), ("unit", self.unit, questions.unit)):
            if then != now:
                raise RecordError(f"{where} has another {what}: {then!r}, and the test asks for {now!r}. {ANEW}")
        found = {row.digest: row for row in self.rows}
        digests = questions.digests()
        new = [at for at, digest in enumerate(digests) if digest not in found]
        if new:
            gone = len(found.keys() - set(digests))
            raise RecordError(
                f"{where} has no score of questions[{new[0]}] ({beginning(questions.asked[new[0]])!r}): {len(new)} of"
                f" {len(digests)} questions are new or changed, and {gone} of the {len(found)} recorded ones are asked"
                f" no more. {ANEW}"
            )
        rows = [found[digest] for digest in digests]
        questions.expect_tokens({at: row.tokens for at, row in enumerate(rows) if row.tokens is not None})
        return rows

    def check_base(self, base: Identity | None, where: str) -> None:
        """Raise unless the candidate stands on the base that was scored when this was recorded.

        Raises:
            RecordError: It does not.
        """
        if self.base is None and base is None:
            return
        if self.base is None:
            raise RecordError(
                f"{where} has no scores of a base, since what was recorded had none beside it, and the candidate now"
                f" has the base {base}. {ANEW}"
            )
        if base is None:
            raise RecordError(
                f"{where} has scores of the base {self.base} to tell whether it has moved, and the candidate now has no"
                " base beside it: it is a view, or a spec without an adapter. Pass a spec with an adapter or a"
                f" fine-tuned model. {ANEW}"
            )
        if self.base.is_other_than(base):
            raise RecordError(
                f"{where} was recorded on another base: {self.base}, and the candidate's is {base}. Candidates are"
                f" compared on one base. {ANEW}"
            )


def recorded(
    questions: Questions,
    tuned: Sequence[float],
    control: Sequence[float] | None,
    *,
    name: str,
    base: Identity | None,
    candidate: Identity,
    made_with: Mapping[str, str],
) -> Record:
    """Return the record of a candidate's scores.

    Args:
        questions: What was asked.
        tuned: The candidate's scores.
        control: The base's, if it has one.
        name: As in `Record`, like those below.
        base: What the base is.
        candidate: What the candidate is.
        made_with: What may move scores beside the models.
    """
    kept, base_kept = rounded(tuned), None if control is None else rounded(control)
    rows = tuple(
        RecordedRow(
            digest, None if base_kept is None else base_kept[at], kept[at], questions.tokens.get(at), _text(asked)
        )
        for at, (digest, asked) in enumerate(zip(questions.digests(), questions.asked, strict=True))
    )
    return Record(name, questions.unit, questions.score, base, candidate, made_with, rows)


def check_scale(questions: Questions, tuned: Sequence[float]) -> None:
    """Raise if a record would hold nothing of the scores of the user's own ``score``.

    Raises:
        RecordError: It would.
    """
    if questions.unit == POINTS and any(tuned) and not any(rounded(tuned)):
        raise RecordError(
            f"a record keeps {DECIMALS} decimals, and the scores of {questions.score} are all closer to 0 (the largest"
            f" is {max(tuned, key=abs):.3g}). Have score= give larger numbers, such as 1000 times these."
        )


def rounded(scores: Sequence[float]) -> list[float]:
    """Return scores as a record keeps them, so that what is unchanged differs by exactly 0."""
    return [float(f"{score:.{DECIMALS}f}") + 0.0 for score in scores]  # + 0.0: not -0.0


def _text(question: Any) -> str:
    """The beginning of a question, as any file may hold it: without secrets and half characters."""
    return redacted(beginning(question)).encode("utf-8", "replace").decode("utf-8")


def drift_between(questions: Questions, then: Sequence[RecordedRow], now: Sequence[RecordedRow]) -> float | None:
    """Return how much more the base scores now, in the mean over the prompts; ``None`` where there is no base."""
    pairs = [(old.base, new.base) for old, new in zip(then, now, strict=True)]
    moved = [after - before for before, after in pairs if before is not None and after is not None]
    return questions.mean(moved) if len(moved) == len(pairs) else None


def drift_message(comparison: Comparison, bound: float, then: Record, now: Record, where: str) -> str:
    """Return the sentences that say that the base has moved, and what may have moved it."""
    changes = "; ".join(_changes(then.made_with, now.made_with)) or "device, dtype and versions are the same"
    return (
        f"the base itself has moved: it scores {comparison.drift:+.4g} {comparison.unit} since {where} was recorded,"
        f" and sway_drift allows {bound:.4g}. That is the doing of hardware or versions, not of the adapter"
        f" ({changes})."
        " Run as when it was recorded, raise sway_drift, or record anew what was good enough (--sway-record)."
    )


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name} was {then.get(name, 'not there')}, is {now.get(name, 'not there')}"
