"""`CurrentRun`: what a run of pytest has used so far: its session, the running test, its comparisons."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from pytest_sway.cache.owners import Owner
from pytest_sway.run.registering import registered

if TYPE_CHECKING:
    from pytest_sway.cache.stats import WorkerReport
    from pytest_sway.report.comparisons import Collected
    from pytest_sway.run.regression.hooks import Regression
    from pytest_sway.run.serving.session import SwaySession
    from pytest_sway.run.settings import SwaySettings


class CurrentRun:
    """The state of one run. Each part is made when it is first asked for.

    Args:
        config: The run's configuration.
        settings: The settings of the run.
        terminal: A descriptor of standard error that pytest's capture does not replace.

    Attributes:
        running: The running test or fixture.
        used: The session; ``None`` if no test has used it.
        regression: The hooks around ``sway_compare``; ``None`` if no test has used it.
        collected: The collected comparisons; ``None`` if the run neither makes nor reports any.
    """

    def __init__(self, config: pytest.Config, settings: SwaySettings, terminal: int) -> None:
        self._config = config
        self._settings = settings
        self._terminal = terminal
        self.running = Owner("the session")
        self.used: SwaySession | None = None
        self.regression: Regression | None = None
        self.collected: Collected | None = None

    def session(self) -> SwaySession:
        """Return the session, opening it on first use."""
        if self.used is None:
            from pytest_sway.run.serving.session import open_session

            self.used = open_session(self._config, self._settings, self._owner, self._terminal)
        return self.used

    def comparing(self) -> Regression:
        """Return the hooks around ``sway_compare``, registering them on first use."""
        if self.regression is None:
            from pytest_sway.run.regression.hooks import Regression

            self.collect()
            make = partial(Regression, self.session().requests, self._settings)
            self.regression = registered(self._config, "pytest_sway_regression", make)
        return self.regression

    def collect(self) -> Collected:
        """Return the collected comparisons of the run, registering their plugin on first use."""
        if self.collected is None:
            from pytest_sway.report.comparisons import Collected

            make = partial(Collected, each=self._config.getoption("dist", "no") == "each")
            self.collected = registered(self._config, "pytest_sway_collected", make)
        return self.collected

    def reports(self) -> list[WorkerReport]:
        """Return the counts of this process, which runs the tests itself."""
        from pytest_sway.cache.stats import WorkerReport

        return [WorkerReport("main", None if self.used is None else self.used.stats)]

    def end(self, session: pytest.Session) -> None:
        """Close every backend, send a worker's counts, and fail the run if weights have leaked."""
        if self.used is None:
            return
        from pytest_sway.run.controller import publish

        self.running = Owner("the session's end")
        self.used.close()
        publish(self._config, self.used.stats)
        if self._settings.fails_run(self.used.stats.leaks) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def summarize(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the comparisons, what was recorded, and the summary if a test used a backend."""
        if self.collected is not None:
            from pytest_sway.report.comparisons import write_comparisons

            write_comparisons(terminalreporter, self.collected.comparisons())
        if self._config.getoption("sway_record"):
            from pytest_sway.run.regression.records import write_recorded

            write_recorded(terminalreporter)
        if self.used is not None:
            from pytest_sway.report.summary import write_summary

            fails = self._settings.fails_run(self.used.stats.leaks)
            write_summary(terminalreporter, self.used.stats, fails=fails)

    def _owner(self) -> Owner:
        return self.running
