"""The run's table of comparisons, which travel in the reports of their tests: to JUnit, and from xdist's workers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    import pytest

    from pytest_sway.comparison.comparison import Claim, Comparison

PROPERTY: Final = "sway_compare"
_FIELDS: Final = ("name", "candidate", "baseline", "unit", "mean", "low", "high", "n", "confidence")
_COLUMNS: Final = ("comparison", "test", "prompts", "mean", "low", "high", "unit", "asserted")
_NUMBERS: Final = ("prompts", "mean", "low", "high")


class Asserted(Protocol):
    """A comparison, and what a failing test has asserted of it."""

    comparison: Comparison
    claim: Claim | None


def set_properties(properties: list[tuple[str, object]], compared: Iterable[Asserted]) -> None:
    """Put comparisons among a test's ``user_properties``, in the place of those that are there."""
    properties[:] = [each for each in properties if each[0] != PROPERTY]
    for each in compared:
        values = {name: getattr(each.comparison, name) for name in _FIELDS}
        if each.claim is not None:
            values["claim"], values["verdict"] = str(each.claim), each.comparison.verdict(each.claim)
        properties.append((PROPERTY, json.dumps(values)))


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
    rows = [_row(each, failed) for each, failed in sorted(found, key=lambda pair: not pair[1])]
    columns = [(name, *cells) for name, cells in zip(_COLUMNS, zip(*rows, strict=True), strict=True) if any(cells)]
    aligned = [
        [
            cell.rjust(max(map(len, column))) if column[0] in _NUMBERS else cell.ljust(max(map(len, column)))
            for cell in column
        ]
        for column in columns
    ]
    for row in zip(*aligned, strict=True):
        yield "  ".join(row).rstrip()
    confidences = sorted({float(each["confidence"]) for each, _ in found})
    yield f"low to high: {' or '.join(f'{100 * each:.4g}%' for each in confidences)} interval of the mean"


def _row(each: Mapping[str, Any], failed: bool) -> tuple[str, ...]:
    numbers = (f"{each[name]:+.4g}" for name in ("mean", "low", "high"))
    verdict = f"{each['claim']}: {each['verdict']}" if "claim" in each else ""
    return (each["name"], "failed" if failed else "passed", str(each["n"]), *numbers, each["unit"], verdict)


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
