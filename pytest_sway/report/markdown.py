"""The record of a run as Markdown, for a page such as GitHub's summary of a job."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pytest_sway.report.comparisons import cells, failures_first, legend, shown
from pytest_sway.system.wording import visible

_COLUMNS: Final = ("comparison", "test", "prompts", "mean", "low", "high", "p", "unit", "shown")
_WORST: Final = 10
_LONGEST: Final = 300
_MOST: Final = 900_000
"""Bytes. GitHub shows no summary of a step that is larger than 1 MiB."""
_SPECIAL: Final = str.maketrans({character: f"&#{ord(character)};" for character in "\\`*_{}[]()#!|~$:"})
"""What Markdown gives a meaning within a line, GitHub's with its links and formulas. As a number, each is itself."""


def markdown(record: Mapping[str, Any]) -> str:
    """Return the table of a run's comparisons, and the worst texts of each failed one.

    Args:
        record: The run's record.
    """
    lines = ["## sway comparisons", ""]
    comparisons = failures_first(record["comparisons"])
    if not comparisons:
        return "\n".join([*lines, "No test of this run has compared anything.", ""])
    lines += _table(_COLUMNS, [_row(each) for each in comparisons])
    lines += ["", *(f"{escaped(line)}  " for line in legend(comparisons)), ""]
    size = sum(map(len, lines))
    for each in comparisons:
        if each["outcome"] != "failed":
            break
        details = list(_details(each))
        size += sum(len(line.encode("utf-8", "replace")) + 1 for line in details)
        if size > _MOST:
            lines.append("The worst texts of the other failures have no room here.")
            break
        lines += details
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """``text`` on one line, without a meaning in Markdown or in HTML."""
    return html.escape(visible(" ".join(text.split())), quote=False).translate(_SPECIAL)


def _row(each: Mapping[str, Any]) -> list[str]:
    name, unit = escaped(each["name"]), escaped(each["unit"])
    return [name, each["outcome"], *cells(each), unit, escaped(shown(each))]


def _details(each: Mapping[str, Any]) -> Iterator[str]:
    worst = sorted(each["rows"], key=lambda row: float(row["candidate"] - row["baseline"]))[:_WORST]
    yield f"### {escaped(each['name'])}"
    yield ""
    yield f"Test {escaped(each['test'])}: the worst {len(worst)} of {len(each['rows'])}"
    yield ""
    columns = ("difference", escaped(each["candidate"]), escaped(each["baseline"]), "question")
    yield from _table(columns, [[*_scores(row), escaped(_shortened(row["question"]))] for row in worst])
    yield ""


def _scores(row: Mapping[str, Any]) -> Iterator[str]:
    numbers = (row["candidate"] - row["baseline"], row["candidate"], row["baseline"])
    yield from (f"{number:.4g}" for number in numbers)


def _shortened(question: str | Sequence[str]) -> str:
    text = question if isinstance(question, str) else "".join(question)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
