"""`Reports`: writes the files of ``--sway-json``, ``--sway-markdown`` and ``--sway-html`` at the end of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_sway.report.files import append_text, write_json, write_text
from pytest_sway.report.html.page import page
from pytest_sway.report.markdown import markdown
from pytest_sway.report.run_record import Run, run_record
from pytest_sway.run.named_specs import named_specs
from pytest_sway.run.settings import REPORTS, option_of
from pytest_sway.system.machine import imported_versions

if TYPE_CHECKING:
    from pytest_sway.cache.stats import WorkerReport
    from pytest_sway.report.comparisons import Collected

_WRITERS: Final[dict[str, Callable[[dict[str, Any], Path], None]]] = {
    "sway_json": write_json,
    "sway_markdown": lambda record, path: append_text(markdown(record), path),
    "sway_html": lambda record, path: write_text(page(record), path),
}


class Reports:
    """A plugin that writes the files, in the process that receives all test reports.

    Args:
        config: The run's configuration.
        collected: The run's comparisons.
        workers: Returns the report of each process that ran tests.

    Raises:
        pytest.UsageError: A file cannot be written.
    """

    def __init__(
        self,
        config: pytest.Config,
        collected: Collected,
        workers: Callable[[], Sequence[WorkerReport]],
    ) -> None:
        self._paths: Final = report_paths(config)
        self._collected: Final = collected
        self._workers: Final = workers
        self._started: Final = (time.time(), time.perf_counter())
        self._lines: Final[list[tuple[str, bool]]] = []
        self._ran = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> None:
        """Note that tests run: ``--fixtures`` and similar options start a session without tests."""
        self._ran = True

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the files after everything else has ended. A file that cannot be written fails the run."""
        if not self._ran:
            return
        record = self._record(session)
        for name, path in self._paths.items():
            try:
                _WRITERS[name](record, path)
            except OSError as error:
                self._lines.append((f"{option_of(name)}: {path} cannot be written: {error.strerror or error}", True))
                if session.exitstatus == pytest.ExitCode.OK:
                    session.exitstatus = pytest.ExitCode.TESTS_FAILED
            else:
                self._lines.append((f"{option_of(name)}: wrote {path}", False))

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print which files were written."""
        for line, failed in self._lines:
            terminalreporter.write_line(line, red=failed)

    def _record(self, session: pytest.Session) -> dict[str, Any]:
        started, tick = self._started
        config = session.config
        arguments = [str(argument) for argument in config.invocation_params.args]
        return run_record(
            Run(started, time.perf_counter() - tick, int(session.exitstatus), arguments),
            self._collected.comparisons(),
            self._workers(),
            distributed=config.pluginmanager.has_plugin("pytest_sway_controller"),
            named=_named(config),
            versions=imported_versions(),
        )


def _named(config: pytest.Config) -> Mapping[str, Any]:
    try:
        return named_specs(config)
    except Exception:  # each test that asked for a name has already failed with it
        return {}


def report_paths(config: pytest.Config) -> dict[str, Path]:
    """Return the files to write by option; relative paths start at the folder in which pytest was called.

    Raises:
        pytest.UsageError: Two options name one file, a file cannot be written, or a library is missing.
    """
    paths: dict[str, Path] = {}
    for name in REPORTS:
        text = config.getoption(name)
        if text is None:
            continue
        path = config.invocation_params.dir / os.path.expanduser(str(text))
        wrong = _why_not(path, str(text), appended=name == "sway_markdown")
        if os.path.realpath(path) in map(os.path.realpath, paths.values()):
            wrong = "another report is written to this file"
        if wrong is not None:
            raise pytest.UsageError(f"{option_of(name)}: {wrong}; found {str(text)!r}.")
        if name == "sway_html" and find_spec("jinja2") is None:
            raise pytest.UsageError(
                "--sway-html needs Jinja2, which this environment lacks. Install it with: pip install"
                " 'pytest-sway[html]'"
            )
        paths[name] = path
    return paths


def _why_not(path: Path, text: str, *, appended: bool) -> str | None:
    """Return why a report cannot be written to a path; ``None`` if it can."""
    if not text.strip():
        return "must be the path of a file, not empty"
    if not os.path.isdir(path.parent):
        return f"the folder {str(path.parent)!r} does not exist; create it first"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        return f"{str(path)!r} cannot be written ({getattr(error, 'strerror', error)})"
    if mode is not None and (S_ISDIR(mode) or not (appended or S_ISREG(mode))):
        return "must be the path of a " + (
            "file, not of a folder" if S_ISDIR(mode) else "regular file, which can be replaced"
        )
    # Replacing a file needs a writable folder; appending needs a writable file.
    checked = path if appended and mode is not None else path.parent
    if not os.access(checked, os.W_OK):
        return f"{str(checked)!r} cannot be written"
    return None
