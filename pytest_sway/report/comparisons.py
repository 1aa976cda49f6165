"""The comparisons in test reports, which JUnit and xdist's controller get, and the table at the end of the run.

`Collected` holds those of a run, from the test reports of this process or of xdist's workers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from pytest_sway.system.redaction import redacted, redacted_values
from pytest_sway.system.wording import natural

if TYPE_CHECKING:
    import pytest

    from pytest_sway.comparison.comparison import Claim, Comparison


PROPERTY: Final = "sway_compare"
"""The name of an entry of a test's ``user_properties`` that holds the numbers of a comparison as JSON."""

ROWS: Final = "sway_rows"
"""The attribute of a test's report that holds, as JSON, the rows of comparisons that no earlier report carried."""

_FIELDS: Final = (
    "name",
    "candidate",
    "baseline",
    "unit",
    "mean",
    "low",
    "high",
    "n",
    "confidence",
    "detectable",
    "drift",
)
COLUMNS: Final = ("comparison", "outcome", "prompts", "mean", "low", "high", "p", "unit", "shown")
"""The titles of the table. ``outcome`` is whether the test passed."""

_NUMBERS: Final = ("prompts", "mean", "low", "high", "p")


class Asserted(Protocol):
    """A comparison, and the claim that its test asserted, if known."""

    comparison: Comparison
    claim: Claim | None
    tokens: Mapping[int, dict[str, Any]]


def values_of(properties: Iterable[object], name: str) -> Iterator[Any]:
    """Yield the values with this name among a test's ``user_properties``; a test may add others of any form."""
    for each in properties:
        if isinstance(each, list | tuple) and len(each) == 2 and each[0] == name:
            yield each[1]


def set_properties(properties: list[tuple[str, object]], compared: Iterable[Asserted]) -> None:
    """Replace the comparisons among a test's ``user_properties``."""
    properties[:] = [each for each in properties if not list(values_of([each], PROPERTY))]
    properties += [(PROPERTY, json.dumps(redacted_values(_numbers(each)))) for each in compared]


def rows_of(compared: Iterable[Asserted]) -> str:
    """Return the rows of comparisons as JSON for their test's report: one list of rows for each comparison."""
    rows = [[_row_of(row, each.tokens.get(at)) for at, row in enumerate(each.comparison.rows)] for each in compared]
    return json.dumps(redacted_values(rows, deepest=20))


def _numbers(each: Asserted) -> dict[str, Any]:
    values = {name: getattr(each.comparison, name) for name in _FIELDS}
    values["p"] = each.comparison.p_value
    values["against_0"] = each.comparison.against_0
    if each.claim is not None:
        values["claim"], values["margin"] = str(each.claim), each.claim.margin
        values["verdict"] = each.comparison.verdict(each.claim)
    return {name: finite(value) for name, value in values.items()}


def finite(value: Any) -> Any:
    """Return ``value``, or ``None`` for infinity and NaN, which JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row_of(row: Any, tokens: dict[str, Any] | None) -> dict[str, Any]:
    values = {"question": _question(row.question), "candidate": row.candidate, "baseline": row.baseline}
    return values if tokens is None else {**values, "tokens": tokens}


def _question(question: Any) -> str | list[str]:
    """Return a text as it is, a prompt and its answer as two texts, and anything else as its ``repr``."""
    if isinstance(question, str):
        return question
    if isinstance(question, Sequence) and len(question) == 2 and isinstance(question[1], str):
        return [question[0] if isinstance(question[0], str) else repr(question[0]), question[1]]
    return repr(question)


# --- the table --------------------------------------------------------------------------------------------------------


def write_comparisons(terminal: pytest.TerminalReporter, comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Write the table, if there are comparisons.

    Args:
        terminal: The reporter to write to.
        comparisons: The comparisons of the run record.
    """
    if comparisons:
        terminal.write_sep("=", "sway comparisons")
        for line in table_lines(comparisons):
            terminal.write_line(redacted(line))


def table_lines(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, failed tests first.

    Args:
        comparisons: The comparisons of the run record.
    """
    rows = [_table_row(each) for each in failures_first(comparisons)]
    aligned = [
        [
            cell.rjust(max(map(len, column))) if column[0] in _NUMBERS else cell.ljust(max(map(len, column)))
            for cell in column
        ]
        for column in zip(COLUMNS, *rows, strict=True)
    ]
    for row in zip(*aligned, strict=True):
        yield "  ".join(row).rstrip()
    yield from legend(comparisons)


def failures_first(comparisons: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the comparisons of failed tests, then the others, each in their order.

    If several tests have comparisons of one name, as without ``name=``, the test is added to the name.
    """
    tests: dict[str, set[str]] = {}
    for each in comparisons:
        tests.setdefault(each["name"], set()).add(each["test"])
    named = [{**each, "name": f"{each['name']}{_of_test(each['test'], tests[each['name']])}"} for each in comparisons]
    return sorted(named, key=lambda each: each["outcome"] != "failed")


def _of_test(test: str, tests: Collection[str]) -> str:
    """Return the test in brackets: its name, or its node id if the names are not enough."""
    if len(tests) == 1:
        return ""
    own = {each.partition("::")[2] for each in tests}
    return f" ({test.partition('::')[2] if len(own) == len(tests) else test})"


def legend(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines that explain the columns of a table."""
    confidences = sorted({float(each["confidence"]) for each in comparisons})
    confidence = " or ".join(f"{100 * each:.4g}%" for each in confidences)
    adjusted = "" if len(comparisons) == 1 else f" (Holm, {len(comparisons)} comparisons)"
    yield f"low to high: {confidence} confidence interval of the mean; p: p-value of no difference{adjusted}"
    if any(each["claim"] is None for each in comparisons):
        yield "shown: the verdict on the asserted margin, or on 0 if the margin is not known"


def shown(each: Mapping[str, Any]) -> str:
    """Return the verdict on the margin that the test asserted, or on 0 if the margin is not known.

    An interval of exactly 0 is neither over nor under a margin of 0.
    """
    exactly = each["low"] == each["high"] == each["margin"] == 0.0
    return each["against_0"] if each["claim"] is None or exactly else f"{each['claim']}: {each['verdict']}"


def cells(each: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a comparison's cells of a table: prompts, mean, low, high and p."""
    numbers = (f"{each[name]:+.4g}" for name in ("mean", "low", "high"))
    return (str(each["n"]), *numbers, f"{each['p_holm']:.2g}")


def _table_row(each: Mapping[str, Any]) -> tuple[str, ...]:
    return (each["name"], each["outcome"], *cells(each), each["unit"], shown(each))


@dataclass(slots=True)
class _Try:
    """The comparisons of one try of a test, as JSON."""

    outcome: str
    numbers: list[str] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)


class Collected:
    """A plugin that keeps the comparisons of each test's last try.

    Args:
        each: Whether each worker runs all tests. Then each worker's run of a test counts.
    """

    def __init__(self, *, each: bool = False) -> None:
        self._each: Final = each
        self._tries: Final[dict[tuple[str, str], _Try]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect a report's comparisons. The first report of a try discards the try before it."""
        key = (report.nodeid, getattr(report, "worker_id", "") if self._each else "")
        if report.when == "setup":
            self._tries.pop(key, None)
        numbers = [str(value) for value in values_of(report.user_properties, PROPERTY)]
        failed = report.failed or report.outcome not in ("passed", "skipped")  # or rerun
        if numbers or failed:  # a subtest may fail before the first comparison
            self._tries.setdefault(key, _Try(report.outcome))
        if (found := self._tries.get(key)) is None:
            return
        found.numbers = numbers or found.numbers
        found.rows += json.loads(getattr(report, ROWS, "[]"))
        if failed:
            found.outcome = "failed"
        elif report.when == "call" and found.outcome != "failed":  # as a subtest has
            found.outcome = report.outcome

    def comparisons(self) -> list[dict[str, Any]]:
        """Return all comparisons in the form of the run record, ordered by test, whichever worker was faster."""
        from pytest_sway.comparison.statistics import holm

        ordered = sorted(self._tries, key=lambda key: tuple(map(natural, key)))
        found = [each for key in ordered for each in _comparisons(key, self._tries[key])]
        for each, p in zip(found, holm([each["p"] for each in found]), strict=True):
            each["p_holm"] = p
        return found


def _comparisons(key: tuple[str, str], tried: _Try) -> list[dict[str, Any]]:
    nodeid, worker = key
    return [
        {
            "test": f"[{worker}] {nodeid}" if worker else nodeid,
            "outcome": tried.outcome,
            "claim": None,
            "margin": None,
            "verdict": None,
            **json.loads(numbers),
            "p_holm": 1.0,
            "rows": rows,
        }
        for numbers, rows in zip(tried.numbers, [*tried.rows, *([] for _ in tried.numbers)], strict=False)
    ]
