"""Keeping secrets out of what pytest shows, whoever raised, logged or printed them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from pytest_sway.system.redaction import redacted_values, without_secrets

if TYPE_CHECKING:
    import warnings

_DEEPEST: Final = 20
"""Containers within each other in a report as pytest writes it for others; of the exceptions' local variables, 10."""


class SecretsHidden:
    """The hooks that everything passes on its way to the terminal, to JUnit and to the controller of workers.

    Registered once a run has used a backend; reports of other runs are none of our business.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Hide what a failure's traceback and a test's captured output quote."""
        if report.longrepr is None and not report.sections:
            return
        hook, config = self._config.hook, self._config
        data = hook.pytest_report_to_serializable(config=config, report=report)
        shown = {name: data[name] for name in ("longrepr", "sections")}
        hidden = redacted_values(shown, _DEEPEST)
        if hidden != shown:
            clean = hook.pytest_report_from_serializable(config=config, data={**data, **hidden})
            report.longrepr, report.sections = clean.longrepr, clean.sections

    @pytest.hookimpl(tryfirst=True)
    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage) -> None:
        """Hide what a warning quotes; what a thread raised is one of pytest's."""
        if isinstance(warning_message.message, Warning):
            without_secrets(warning_message.message)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Hide what ``pytest.exit`` says."""
        without_secrets(excinfo.value)
