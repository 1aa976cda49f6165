"""A comparison as the page shows it, made from its part of the run record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

from pytest_sway.report.comparisons import shown
from pytest_sway.report.html.axes import Axis, Bars
from pytest_sway.report.html.texts import Run, Token, brief, clipped, most_changed, parts, runs
from pytest_sway.report.html.words import failed, typeset

_EXTREMES: Final = 5
_ROWS: Final = 10_000
_TOKENS: Final = 30_000
"""How many rows and tokens fit on a page. Its comparisons share them; each gets a minimum."""
_LONGEST: Final = 400


class Room(NamedTuple):
    """How many rows of one comparison, and how many tokens of each text, the page shows."""

    rows: int
    tokens: int

    @classmethod
    def among(cls, comparisons: int) -> Self:
        """Return an equal share for each comparison."""
        tokens = _TOKENS // (comparisons * 2 * _EXTREMES)
        return cls(max(_ROWS // comparisons, 20), min(max(tokens, 20), _LONGEST))


class Row(NamedTuple):
    """A question in the table of all questions."""

    question: str
    difference: float
    candidate: float
    baseline: float


@dataclass(frozen=True, slots=True)
class Text:
    """One of the worst or best questions, with its tokens where they are known.

    Attributes:
        row: Its scores.
        prompt: The prompt.
        answer: The scored answer or text.
        sides: Each side to compare with, and the text coloured by how much more probable the candidate finds it.
        tokens: The tokens that changed most.
        left_out: The number of tokens that are not shown.
    """

    row: Row
    prompt: str
    answer: str
    sides: list[tuple[str, list[Run]]]
    tokens: list[Token]
    left_out: int

    @classmethod
    def of(cls, row: Mapping[str, Any], most: int) -> Self:
        """Return a row of the record as the page shows it, with at most ``most`` tokens."""
        known = row.get("tokens") or {}
        tokens = {side: values and values[:most] for side, values in known.items()}
        prompt, answer = parts(row["question"])
        others = ("baseline",) if known.get("base") == known.get("baseline") else ("baseline", "base")
        sides = [(side, runs(tokens, "candidate", side)) for side in others]
        return cls(
            _row(row),
            clipped(prompt, from_end=True),
            clipped(answer),
            [(side, coloured) for side, coloured in sides if coloured],
            most_changed(known),
            len(known.get("text") or ()) - len(tokens.get("text") or ()),
        )


@dataclass(frozen=True, slots=True)
class Shown:
    """A comparison on the page.

    Attributes:
        record: Its part of the run record.
        number: Its place on the page.
        failed: Whether its test failed.
        asserted: The verdict on the claim that its test asserted.
        margin: The margin that its test asserted; ``None`` if it is not known.
        holds: The part of the axis where the claim holds, from and to, in percent.
        axis: The axis of its interval, shared by all comparisons of the same unit.
        bars: Its differences, sorted.
        lost: The number of questions that lost.
        gained: The number of questions that gained.
        worst: The worst questions.
        best: The best of the others.
        rows: All questions from the worst to the best, or as many of both ends as fit.
    """

    record: Mapping[str, Any]
    number: int
    failed: bool
    asserted: str
    margin: float | None
    holds: tuple[float, float]
    axis: Axis
    bars: Bars
    lost: int
    gained: int
    worst: list[Text]
    best: list[Text]
    rows: list[Row]

    @classmethod
    def of(cls, record: Mapping[str, Any], number: int, axis: Axis, room: Room) -> Self:
        """Return a comparison of the record as the page shows it."""
        scored = (row for row in record.get("rows") or () if None not in (row["candidate"], row["baseline"]))
        ordered: Sequence[Mapping[str, Any]] = sorted(scored, key=_difference)
        differences = list(map(_difference, ordered))
        margin = record["margin"]
        under = (record["claim"] or "").startswith("under")
        holds = (0.0, axis.at(margin)) if under else (axis.at(margin), 100.0)
        return cls(
            record,
            number,
            failed(record),
            typeset(shown(record)),
            margin,
            holds,
            axis,
            Bars.of(differences, record["mean"]),
            sum(each < 0 for each in differences),
            sum(each > 0 for each in differences),
            [Text.of(row, room.tokens) for row in ordered[:_EXTREMES]],
            [Text.of(row, room.tokens) for row in ordered[_EXTREMES:][-_EXTREMES:][::-1]],
            [_row(row) for row in _both_ends(ordered, room.rows)],
        )


def _both_ends(ordered: Sequence[Any], most: int) -> Sequence[Any]:
    return ordered if len(ordered) <= most else [*ordered[: most - most // 2], *ordered[-(most // 2) :]]


def _difference(row: Mapping[str, Any]) -> float:
    return float(row["candidate"]) - float(row["baseline"])


def _row(row: Mapping[str, Any]) -> Row:
    return Row(brief(row["question"]), _difference(row), row["candidate"], row["baseline"])
