"""Recorded scores: the scores of an earlier candidate, which replace a baseline.

A `Record` returns the scores of a test's questions (`Record.rows_of`) if the score, unit and base are the same.
`pytest_sway.comparison.record_file` converts it to text and back.
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
    """A model's identity, the same on every machine.

    Attributes:
        name: Its name, for people and for models without local files.
        digest: The digest of its files; ``None`` if it has none here.
    """

    name: str
    digest: str | None = None

    def is_other_than(self, other: Identity) -> bool:
        """Return whether two models differ: by digest, or by name if one has no digest."""
        if self.digest is None or other.digest is None:
            return self.name != other.name
        return self.digest != other.digest

    def __str__(self) -> str:
        return self.name if self.digest is None else f"{self.name} (digest {self.digest[:12]})"


class RecordedRow(NamedTuple):
    """The scores of one question.

    Attributes:
        digest: The question's digest.
        base: The base's score; ``None`` if the candidate had no base.
        tuned: The candidate's score.
        tokens: The number of tokens that the score is a mean over; ``None`` if it is no such mean.
        question: The question's beginning, for people.
    """

    digest: str
    base: float | None
    tuned: float
    tokens: int | None
    question: str


@dataclass(frozen=True, slots=True)
class Record:
    """The recorded scores of one comparison.

    Attributes:
        name: The name by which the test finds it again.
        unit: The unit of the scores.
        score: The name of the score.
        base: The candidate's base, if it was scored too.
        candidate: The recorded model, for people.
        made_with: Device, dtype and versions, for people.
        rows: One row for each question.
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
            questions: The questions of this run. They are told how many tokens each had.
            where: The file's name in errors.

        Raises:
            RecordError: The questions were scored differently, or one is new.
        """
        for what, then, now in (("score", self.score, questions.score), ("unit", self.unit, questions.unit)):
            if then != now:
                raise RecordError(f"{where} has another {what}: {then!r}, but the test asks for {now!r}. {ANEW}")
        found = {row.digest: row for row in self.rows}
        digests = questions.digests()
        new = [at for at, digest in enumerate(digests) if digest not in found]
        if new:
            gone = len(found.keys() - set(digests))
            raise RecordError(
                f"{where} has no score of questions[{new[0]}] ({beginning(questions.asked[new[0]])!r}): {len(new)} of"
                f" {len(digests)} questions are new or changed, and {gone} of the {len(found)} recorded ones are no"
                f" longer asked. {ANEW}"
            )
        rows = [found[digest] for digest in digests]
        questions.expect_tokens({at: row.tokens for at, row in enumerate(rows) if row.tokens is not None})
        return rows

    def check_base(self, base: Identity | None, where: str) -> None:
        """Check that the candidate has the base that was scored for this record.

        Raises:
            RecordError: It has another base, or none.
        """
        if self.base is None and base is None:
            return
        if self.base is None:
            raise RecordError(
                f"{where} has no scores of a base, since the recorded candidate had none, but the candidate now has"
                f" the base {base}. {ANEW}"
            )
        if base is None:
            raise RecordError(
                f"{where} has scores of the base {self.base}, to measure its drift, but the candidate now has no base:"
                " it is a view, or a spec without an adapter. Pass a spec with an adapter or a fine-tuned model."
                f" {ANEW}"
            )
        if self.base.is_other_than(base):
            raise RecordError(
                f"{where} was recorded on another base: {self.base}, but the candidate's is {base}. Candidates are"
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
        questions: The questions.
        tuned: The candidate's scores.
        control: The base's scores, if the candidate has a base.
        name: The name by which the test finds the record again.
        base: The base's identity.
        candidate: The candidate's identity.
        made_with: Device, dtype and versions, which may move scores too.
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
    """Check that the scores of a user's own ``score`` are not all rounded to 0 in a record.

    Raises:
        RecordError: They are.
    """
    if questions.unit == POINTS and any(tuned) and not any(rounded(tuned)):
        raise RecordError(
            f"a record keeps {DECIMALS} decimals, and the scores of {questions.score} are all closer to 0 (the largest"
            f" is {max(tuned, key=abs):.3g}). Make score= return larger numbers, such as 1000 times these."
        )


def rounded(scores: Sequence[float]) -> list[float]:
    """Return scores as a record keeps them, so that unchanged scores differ by exactly 0."""
    return [float(f"{score:.{DECIMALS}f}") + 0.0 for score in scores]  # + 0.0: not -0.0


def _text(question: Any) -> str:
    """Return the beginning of a question, without secrets and lone surrogates."""
    return redacted(beginning(question)).encode("utf-8", "replace").decode("utf-8")


def drift_between(questions: Questions, then: Sequence[RecordedRow], now: Sequence[RecordedRow]) -> float | None:
    """Return how much more the base scores now, as a mean over the prompts; ``None`` if there is no base."""
    pairs = [(old.base, new.base) for old, new in zip(then, now, strict=True)]
    moved = [after - before for before, after in pairs if before is not None and after is not None]
    return questions.mean(moved) if len(moved) == len(pairs) else None


def drift_message(comparison: Comparison, bound: float, then: Record, now: Record, where: str) -> str:
    """Return the message that the base has moved, and what may have moved it."""
    changes = "; ".join(_changes(then.made_with, now.made_with))
    cause = (
        f"Hardware or versions cause this ({changes})"
        if changes
        else "Device, dtype and versions are the same: other hardware or edited files of the base cause this"
    )
    moved = comparison.drift or 0.0
    return (
        f"the base itself has moved: it scores {abs(moved):.4g} {comparison.unit} {'more' if moved > 0 else 'less'}"
        f" than when {where} was recorded, and sway_drift allows {bound:.4g}. {cause}, not the adapter. Run as when it"
        " was recorded, raise sway_drift, or record again a candidate that was good enough (--sway-record)."
    )


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name} was {then.get(name, 'not there')}, is {now.get(name, 'not there')}"
