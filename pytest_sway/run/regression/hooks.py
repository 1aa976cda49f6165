"""pytest's hooks around ``sway_compare``, registered when a test first asks for it."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING

import pytest

from pytest_sway.report.comparisons import ROWS, rows_of, set_properties
from pytest_sway.run.regression.comparing import Compared, comparing
from pytest_sway.run.regression.records import PROPERTY, Records, place
from pytest_sway.run.settings import asks_for_reports

if TYPE_CHECKING:
    from pytest_sway.run.regression.comparing import SwayCompare
    from pytest_sway.run.serving.requests import Requests
    from pytest_sway.run.settings import SwaySettings

_compared = pytest.StashKey[list[Compared]]()
_records = pytest.StashKey[Records]()


class Regression:
    """The hooks of one run.

    Args:
        requests: Hands out backends.
        settings: The settings of the run.
    """

    def __init__(self, requests: Requests, settings: SwaySettings) -> None:
        self._requests = requests
        self._settings = settings
        self._running: list[Compared] = []

    def sway_compare(self, request: pytest.FixtureRequest) -> SwayCompare:
        """Return the fixture of one test."""
        config, stash = request.config, request.node.stash
        records = stash[_records] = Records(request.node, recording=config.getoption("sway_record"))
        made = stash[_compared] = self._running = list[Compared]()
        return comparing(
            partial(self._requests.backends_for, request.node.nodeid, ()),
            self._requests.resolve,
            records=records,
            confidence=self._settings.confidence,
            drift=self._settings.drift,
            made=made.append,
            tokens=config.getoption("sway_html") is not None,
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Forget the comparisons of an earlier try of the test."""
        self._running = []
        if item.stash.get(_compared, None) is not None:
            del item.stash[_compared]
            set_properties(item.user_properties, ())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Record the scores of a test that passed, after its teardown has found no changed model."""
        result = yield
        records = item.stash.get(_records, None)
        if records is not None and (line := records.end()) is not None:
            item.user_properties.append((PROPERTY, line))
        return result

    def pytest_assertrepr_compare(self, op: str, left: object, right: object) -> None:
        """Note the margin of an assertion about a comparison. pytest shows the assertion itself."""
        for compared in self._running:
            compared.asserted(op, left, right)

    def assertion_passed(self) -> None:
        """Settle the margins of an assertion that passed."""
        for compared in self._running:
            compared.settled(passed=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Put the test's comparisons into its report."""
        compared = item.stash.get(_compared, [])
        # pytest keeps the error of a unittest's test aside, and puts it into the call only after this.
        passed = call.excinfo is None and not getattr(item, "_excinfo", None)
        for each in compared:
            each.settled(passed)
        new = _put_in_order(compared)
        if compared:
            set_properties(item.user_properties, compared)
        report = yield
        if new and asks_for_reports(item.config):
            setattr(report, ROWS, rows_of(new))
        for each in new:
            each.reported = True
        if report.when == "call" and _records in item.stash:
            item.stash[_records].reported(report)
        if report.when == "call" and report.failed:
            report.sections += [("sway_compare", each.report()) for each in compared]
        return report


def _put_in_order(compared: list[Compared]) -> list[Compared]:
    """Put the comparisons that no report has carried in their places, after those that one has; return them."""
    start, end = sum(each.reported for each in compared), len(compared)  # threads may add more meanwhile
    compared[start:end] = sorted(compared[start:end], key=lambda each: place(each.comparison.name, each.thread))
    return compared[start:end]
