"""Hooks that keep secrets out of pytest's output, whoever raised, logged or printed them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from pytest_sway.system.redaction import redacted_values, without_secrets

if TYPE_CHECKING:
    import warnings

_DEEPEST: Final = 20
"""The deepest nesting of containers that is searched in a serialized report."""


class SecretsHidden:
    """The hooks that every report passes on its way to the terminal, to JUnit and to xdist's controller.

    Registered once a run uses a backend; other runs' reports stay as they are.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Hide secrets in a failure's traceback and in a test's captured output."""
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
        """Hide secrets in a warning; an error in a thread arrives here as a warning too."""
        if isinstance(warning_message.message, Warning):
            without_secrets(warning_message.message)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Hide secrets in the reason of ``pytest.exit``."""
        without_secrets(excinfo.value)
