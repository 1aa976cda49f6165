"""The run record as Markdown, for a page such as GitHub's job summary."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from pytest_sway.report.comparisons import COLUMNS, cells, failures_first, legend, shown
from pytest_sway.system.wording import visible

_WORST: Final = 10
_LONGEST: Final = 300
_MOST_ROWS: Final = 500
_MOST: Final = 900_000
"""Bytes. GitHub does not show a step's summary above 1 MiB."""
_SPECIAL: Final = str.maketrans(
    {character: f"&#{ord(character)};" for character in "\\`*_{}[]()#!|~$:"} | {"@": "@&#8288;"}
)
"""Characters with a meaning in GitHub's Markdown, including links and formulas, as numeric character references.

A word joiner, which is invisible, follows ``@``: so GitHub notifies nobody of that name."""


def markdown(record: Mapping[str, Any]) -> str:
    """Return the table of a run's comparisons, and the worst texts of each failed one.

    Args:
        record: The run record.
    """
    lines = ["## sway comparisons", ""]
    comparisons = failures_first(record["comparisons"])
    if not comparisons:
        return "\n".join([*lines, "No test of this run called `sway_compare`.", ""])
    rows = [_row(each) for each in comparisons[:_MOST_ROWS]]
    lines += _table(COLUMNS, rows)
    if len(rows) < len(comparisons):
        lines += ["", f"{len(comparisons) - len(rows)} more comparisons are left out."]
    lines += ["", *(f"{escaped(line)}  " for line in legend(comparisons)), ""]
    size = _size(lines)
    for each in comparisons:
        if each["outcome"] != "failed":
            break
        details = list(_details(each))
        size += _size(details)
        if size > _MOST:
            lines.append("The worst texts of the other failures are left out, because the summary is too long.")
            break
        lines += details
    return "\n".join(lines) + "\n"


def _size(lines: Iterable[str]) -> int:
    """Return the bytes of some lines."""
    return sum(len(line.encode("utf-8", "replace")) + 1 for line in lines)


def escaped(text: str) -> str:
    """Return ``text`` on one line, escaped for Markdown and HTML."""
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
