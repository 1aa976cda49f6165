"""The data that pytest-xdist's controller and its workers exchange.

The controller loads no model. It sends each worker plain data as ``workerinput["pytest_sway"]``. A worker that used a
backend returns its counts as ``workeroutput["pytest_sway"]`` when its session ends. A worker that crashed returns
nothing; the summary names it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TextIO

import pytest

from pytest_sway.cache.stats import SwayStats, WorkerReport
from pytest_sway.report.progress import LoadProgress, noted_loads
from pytest_sway.report.summary import write_summary
from pytest_sway.run.dealing.needs import GROUP
from pytest_sway.system.machine import WORKER_SLOT, threads_for
from pytest_sway.system.run_folder import RunFolder

if TYPE_CHECKING:
    from pytest_sway.run.dealing.xdist_scheduler import Dealing
    from pytest_sway.run.settings import SwaySettings

_KEY: Final = "pytest_sway"
_HERE: Final = "here"


def distributes(config: pytest.Config) -> bool:
    """Return whether this process is the controller of a run with workers."""
    return (
        hasattr(config.hook, "pytest_configure_node")
        and not hasattr(config, "workerinput")
        and not config.getoption("collectonly")
        and config.getoption("dist", "no") != "no"
        and bool(config.getoption("tx", None))
    )


def deals(config: pytest.Config, settings: SwaySettings) -> bool:
    """Return whether pytest-sway deals the tests to the workers: several, and ``--dist`` is not given.

    pytest-xdist turns ``-n`` without ``--dist`` into ``load``, but only in ``config.option``.
    """
    given = config.known_args_namespace
    return (
        settings.reorder
        and distributes(config)
        and config.getoption("dist") == "load"
        and given.dist == "no"
        and not given.distload
        and len([*_expanded(config.getoption("tx"))]) > 1
    )


def worker_data(config: pytest.Config) -> Mapping[str, Any]:
    """Return the data that the controller sent this worker; empty if this process is no worker.

    ``folder``: the path of the run's folder, which the workers on the controller's machine share, else ``None``. The
    controller removes it when the run ends. ``shares_weights``: whether the workers share weights in it. ``deals``:
    whether the controller wants to know what the tests need.
    """
    data: Mapping[str, Any] = getattr(config, "workerinput", {}).get(_KEY, {})
    return data


def weights_folder(config: pytest.Config) -> Path | None:
    """Return the folder in which the workers of a machine share weights; ``None`` if they do not."""
    data = worker_data(config)
    return Path(data["folder"]) if data.get("shares_weights") else None


def publish(config: pytest.Config, stats: SwayStats) -> None:
    """Send a worker's counts to the controller. Call it before the worker's session has ended."""
    if hasattr(config, "workeroutput"):
        config.workeroutput[_KEY] = json.dumps(stats.as_dict())  # JSON carries any text, even undecodable file names


class Node(Protocol):
    """The part of ``xdist.workermanage.WorkerController`` that is used here."""

    gateway: Any
    workerinput: dict[str, Any]


def load_progress(config: pytest.Config, terminal: TextIO | None) -> LoadProgress:
    """Return the progress display of this process; in a worker, it also leaves a note for the controller."""
    worker = getattr(config, "workerinput", {}).get("workerid")
    folder = worker_data(config).get("folder")
    return LoadProgress(terminal, worker=worker, note=_note(folder, worker) if folder and worker else None)


class Controller:
    """The controller's hooks, registered if workers run the tests."""

    def __init__(self, config: pytest.Config, settings: SwaySettings) -> None:
        self._settings = settings
        self._workers_here = max(1, sum(_machine(spec) == _HERE for spec in _expanded(config.getoption("tx"))))
        self._nodes: list[Node] = []
        self._errors: dict[str, str] = {}
        self._folder: RunFolder | None = None
        self._dealing = _dealing(config) if deals(config, settings) else None

    @pytest.hookimpl
    def pytest_report_header(self) -> str | None:
        """Show the number of threads of each worker, unless the user has set it."""
        threads = threads_for(self._workers_here, os.environ).get("OMP_NUM_THREADS")
        return f"sway: OMP_NUM_THREADS={threads} in each of {self._workers_here} workers" if threads else None

    @pytest.hookimpl
    def pytest_xdist_setupnodes(self, specs: Sequence[Any]) -> None:
        """Set the environment variables of the workers before they start, and of their replacements.

        Workers on other machines keep their own number of threads, since their processors are not known here.
        """
        seen: Counter[str] = Counter()
        for spec in specs:
            machine = _machine(str(spec))
            variables = {WORKER_SLOT: str(seen[machine])}
            if machine == _HERE:
                variables |= threads_for(self._workers_here, {**os.environ, **spec.env})
            spec.env = {**variables, **spec.env}
            seen[machine] += 1

    @pytest.hookimpl
    def pytest_configure_node(self, node: Node) -> None:
        """Send a worker its data before it starts; pytest-xdist calls this for replacements too."""
        self._nodes.append(node)
        here = _machine(str(node.gateway.spec)) == _HERE
        shares = here and self._workers_here > 1 and self._settings.share_weights == "auto"
        node.workerinput[_KEY] = {
            "folder": str(self._shared_folder()) if here else None,
            "shares_weights": shares,
            "deals": self._dealing is not None,
        }

    @pytest.hookimpl
    def pytest_testnodedown(self, node: Node, error: object | None) -> None:
        """Remember why a worker crashed."""
        if error:
            self._errors[node.gateway.id] = str(error)

    @pytest.hookimpl
    def pytest_handlecrashitem(self, report: pytest.TestReport) -> None:
        """Remove the group from the node id in xdist's report of a test that killed its worker."""
        nodeid, at, _ = report.nodeid.rpartition(f"@{GROUP}")
        if at:
            report.longrepr = str(report.longrepr).replace(report.nodeid, nodeid)
            report.nodeid = nodeid

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the run for leaks in a worker; all workers have ended by now."""
        if self._settings.fails_run(self.stats().leaks) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print one summary over all workers, if a test used a backend."""
        stats = self.stats()
        fails = self._settings.fails_run(stats.leaks)
        scheduling = None if self._dealing is None else self._dealing.scheduling
        shared = None if scheduling is None else scheduling.shared_loads
        write_summary(terminalreporter, stats, self.reports(), shared_loads=shared, fails=fails)

    @pytest.hookimpl
    def pytest_unconfigure(self) -> None:
        """Remove the workers' shared folder."""
        if self._folder is not None:
            self._folder.remove()

    def reports(self) -> list[WorkerReport]:
        """Return the workers' reports, in the order in which the workers were started.

        After an interrupt pytest-xdist no longer calls ``pytest_testnodedown``, but the workers' data has arrived.
        """
        return [self._report(node) for node in self._nodes]

    def stats(self) -> SwayStats:
        """Return the sum of all workers' counts; each line about a failure starts with the worker's name."""
        total = SwayStats()
        for report in self.reports():
            if report.stats is not None:
                total.merge(report.stats, origin=report.name)
        return total

    def _report(self, node: Node) -> WorkerReport:
        name = node.gateway.id
        output = getattr(node, "workeroutput", None)
        if output is not None:
            sent = output.get(_KEY)
            return WorkerReport(name, None if sent is None else SwayStats.from_dict(json.loads(sent)))
        folder = node.workerinput[_KEY]["folder"]
        loading = () if folder is None else noted_loads(_note(folder, name))
        error = f"crashed ({self._errors[name]})" if name in self._errors else "ended without a report"
        return WorkerReport(name, None, error, loading)

    def _shared_folder(self) -> Path:
        if self._folder is None:
            self._folder = RunFolder()
        return self._folder.path


def _dealing(config: pytest.Config) -> Dealing:
    from pytest_sway.run.dealing.xdist_scheduler import Dealing  # pytest-xdist is installed if this is called

    dealing = Dealing(config)
    config.pluginmanager.register(dealing, "pytest_sway_dealing")
    return dealing


def _note(folder: str, worker: str) -> Path:
    return Path(folder, f"{worker}.loading")


def _expanded(specs: Sequence[str]) -> Iterator[str]:
    """Yield the execution specs of ``--tx``, with ``3*popen`` repeated three times."""
    for spec in specs:
        times, star, rest = spec.partition("*")
        yield from [rest] * int(times) if star and times.isdecimal() else [spec]


def _machine(spec: str) -> str:
    """Return the machine of an execution spec; equal for workers on one machine."""
    keys = dict(part.partition("=")[::2] for part in spec.split("//"))
    if "via" not in keys and "popen" in keys:
        return _HERE
    where = "via" if "via" in keys else next((key for key in ("ssh", "vagrant_ssh", "socket") if key in keys), "")
    return f"{where}={keys.get(where, '').partition(':')[0]}"
