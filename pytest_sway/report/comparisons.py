"""The run's table of comparisons, which travel in the reports of their tests: to JUnit, and from xdist's workers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    import pytest

    from pytest_sway.comparison.comparison import Comparison

PROPERTY: Final = "sway_compare"
_FIELDS: Final = ("name", "candidate", "baseline", "unit", "mean", "low", "high", "n", "confidence")
_COLUMNS: Final = ("comparison", "test", "prompts", "mean", "low", "high", "unit")
_NUMBERS: Final = ("prompts", "mean", "low", "high")


def set_properties(properties: list[tuple[str, object]], comparisons: Iterable[Comparison]) -> None:
    """Put comparisons among a test's ``user_properties``, in the place of those that are there."""
    properties[:] = [each for each in properties if each[0] != PROPERTY]
    for comparison in comparisons:
        numbers = {name: getattr(comparison, name) for name in _FIELDS}
        properties.append((PROPERTY, json.dumps(numbers)))


def write_comparisons(terminal: pytest.TerminalReporter) -> None:
    """Write the table, if a test has compared anything."""
    found = list(_found(terminal.stats))
    if not found:
        return
    terminal.section("sway comparisons")
    for line in table_lines(found):
        terminal.write_line(redacted(line))


def table_lines(found: Sequence[tuple[Mapping[str, Any], bool]]) -> Iterator[str]:
    """The lines of the table, those of failed tests first.

    Args:
        found: Each comparison's numbers, and whether its test failed.
    """
    rows = [_COLUMNS, *(_row(each, failed) for each, failed in sorted(found, key=lambda pair: not pair[1]))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        cells = (
            cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
            for cell, width, column in zip(row, widths, _COLUMNS, strict=True)
        )
        yield "  ".join(cells).rstrip()
    confidences = sorted({float(each["confidence"]) for each, _ in found})
    yield f"low to high: {' or '.join(f'{100 * each:.4g}%' for each in confidences)} interval of the mean"


def _row(each: Mapping[str, Any], failed: bool) -> tuple[str, ...]:
    numbers = (f"{each[name]:+.4g}" for name in ("mean", "low", "high"))
    return (each["name"], "failed" if failed else "passed", str(each["n"]), *numbers, each["unit"])


def _found(stats: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Of each test the comparisons of its last report that has some; not of a try that was run again."""
    last: dict[str, list[str]] = {}
    failed = set()
    for category, reports in stats.items():
        for report in reports if category != "rerun" else ():
            values = [value for name, value in getattr(report, "user_properties", ()) if name == PROPERTY]
            if values:
                last[report.nodeid] = max(values, last.get(report.nodeid, []), key=len)
                failed |= {report.nodeid} if report.failed else set()
    for nodeid, values in last.items():
        yield from ((json.loads(value), nodeid in failed) for value in values)
