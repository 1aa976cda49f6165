"""A comparison as the page shows it, made of its part of the run record."""

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
"""How many rows, and tokens, a page has room for; many comparisons share it, and each has some."""
_LONGEST: Final = 400


class Room(NamedTuple):
    """How much of one comparison is shown: how many rows, and how many tokens of a text."""

    rows: int
    tokens: int

    @classmethod
    def among(cls, comparisons: int) -> Self:
        """An equal share for each."""
        tokens = _TOKENS // (comparisons * 2 * _EXTREMES)
        return cls(max(_ROWS // comparisons, 20), min(max(tokens, 20), _LONGEST))


class Row(NamedTuple):
    """A question in the table of all of them."""

    question: str
    difference: float
    candidate: float
    baseline: float


@dataclass(frozen=True, slots=True)
class Text:
    """One of the worst or best questions, with its tokens where they are known.

    Attributes:
        row: Its scores.
        prompt: What was given.
        answer: What was scored.
        sides: For each other side its name, and the text coloured by how much more probable it became since.
        tokens: Those that changed most.
        left_out: How many tokens are not shown.
    """

    row: Row
    prompt: str
    answer: str
    sides: list[tuple[str, list[Run]]]
    tokens: list[Token]
    left_out: int

    @classmethod
    def of(cls, row: Mapping[str, Any], most: int) -> Self:
        """What is shown of a row of the record, of at most so many tokens."""
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
        asserted: What it shows of what its test asserted.
        margin: What its test asserted a bound to be over or under; ``None`` where that is not known.
        holds: From where to where the axis is as was asserted, in percent.
        axis: The axis on which its interval stands, with others of the same unit.
        bars: Its differences, sorted.
        lost: How many questions lost.
        gained: How many gained.
        worst: The worst questions.
        best: The best of the others.
        rows: All questions from the worst to the best, or as many of the worst and best as there is room for.
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
        """What is shown of a comparison."""
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
