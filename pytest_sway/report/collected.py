"""`Collected`: the comparisons of a run, from the test reports of this process or of xdist's workers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.report.comparisons import PROPERTY, ROWS, values_of
from pytest_sway.system.wording import natural

if TYPE_CHECKING:
    import pytest


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
