"""pytest-xdist: what the controller tells its workers, and what it hears from them.

The controller loads no model. It hands each worker plain data as ``workerinput["pytest_sway"]``; each worker that used
a backend hands back its stats as ``workeroutput["pytest_sway"]`` when its session ends. A worker that crashed hands
back nothing, and is named.
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
from pytest_sway.system.machine import WORKER_SLOT, threads_for
from pytest_sway.system.run_folder import RunFolder

if TYPE_CHECKING:
    from pytest_sway.run.settings import SwaySettings

_KEY: Final = "pytest_sway"
_HERE: Final = "here"


def distributes(config: pytest.Config) -> bool:
    """Return whether this process is the controller of a run whose tests go to workers."""
    return (
        hasattr(config.hook, "pytest_configure_node")
        and not hasattr(config, "workerinput")
        and not config.getoption("collectonly")
        and config.getoption("dist", "no") != "no"
        and bool(config.getoption("tx", None))
    )


def worker_data(config: pytest.Config) -> Mapping[str, Any]:
    """Return what the controller told this worker; empty where there is no controller.

    ``folder``, a path as text, is the run's folder for what the workers of the controller's machine share; workers
    elsewhere have none. The controller removes it when the run ends. ``shares_weights``: whether weights are among it.
    """
    data: Mapping[str, Any] = getattr(config, "workerinput", {}).get(_KEY, {})
    return data


def weights_folder(config: pytest.Config) -> Path | None:
    """Return the folder through which the workers of a machine share weights; ``None`` where each has its own."""
    data = worker_data(config)
    return Path(data["folder"]) if data.get("shares_weights") else None


def publish(config: pytest.Config, stats: SwayStats) -> None:
    """Leave a worker's stats for the controller; called before the worker's session has ended."""
    if hasattr(config, "workeroutput"):
        config.workeroutput[_KEY] = json.dumps(stats.as_dict())  # JSON takes any text, also undecodable file names


class Node(Protocol):
    """A worker as the controller sees it: what is used here of ``xdist.workermanage.WorkerController``."""

    gateway: Any
    workerinput: dict[str, Any]


def load_progress(config: pytest.Config, terminal: TextIO | None) -> LoadProgress:
    """Return what shows the loads of this process, and in a worker leaves a note for the controller."""
    worker = getattr(config, "workerinput", {}).get("workerid")
    folder = worker_data(config).get("folder")
    return LoadProgress(terminal, worker=worker, note=_note(folder, worker) if folder and worker else None)


class Controller:
    """The controller's side, a plugin that is registered while tests are distributed."""

    def __init__(self, config: pytest.Config, settings: SwaySettings) -> None:
        self._settings = settings
        self._workers_here = max(1, sum(_machine(spec) == _HERE for spec in _expanded(config.getoption("tx"))))
        self._nodes: list[Node] = []
        self._errors: dict[str, str] = {}
        self._folder: RunFolder | None = None

    @pytest.hookimpl
    def pytest_report_header(self) -> str | None:
        """Show how many threads each worker gets, where the user has not chosen."""
        threads = threads_for(self._workers_here, os.environ).get("OMP_NUM_THREADS")
        return f"sway: OMP_NUM_THREADS={threads} in each of {self._workers_here} workers" if threads else None

    @pytest.hookimpl
    def pytest_xdist_setupnodes(self, specs: Sequence[Any]) -> None:
        """Give the workers their environment, which they have before they start; replacements of them have it too.

        Workers on other machines keep their own threads: how many processors there are is not known here.
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
        """Tell a worker what it should know before it starts; a worker that replaces another comes here too."""
        self._nodes.append(node)
        here = _machine(str(node.gateway.spec)) == _HERE
        shares = here and self._workers_here > 1 and self._settings.share_weights == "auto"
        node.workerinput[_KEY] = {"folder": str(self._shared_folder()) if here else None, "shares_weights": shares}

    @pytest.hookimpl
    def pytest_testnodedown(self, node: Node, error: object | None) -> None:
        """Remember why a worker ended before its time."""
        if error:
            self._errors[node.gateway.id] = str(error)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the run for what a worker alone would fail it for; the workers have ended by now."""
        if self._settings.fails_run(self.stats().leaks) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print one summary over all workers, if a test used a backend."""
        stats = self.stats()
        write_summary(terminalreporter, stats, self.reports(), fails=self._settings.fails_run(stats.leaks))

    @pytest.hookimpl
    def pytest_unconfigure(self) -> None:
        """Remove what the workers shared."""
        if self._folder is not None:
            self._folder.remove()

    def reports(self) -> list[WorkerReport]:
        """What the workers handed back, in the order in which they were started.

        After an interrupt pytest-xdist tells of no worker's end any more, but what they sent has arrived.
        """
        return [self._report(node) for node in self._nodes]

    def stats(self) -> SwayStats:
        """All workers' stats as one; each line about what went wrong starts with the worker's name."""
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


def _note(folder: str, worker: str) -> Path:
    return Path(folder, f"{worker}.loading")


def _expanded(specs: Sequence[str]) -> Iterator[str]:
    """The execution specs of ``--tx``, with ``3*popen`` written out."""
    for spec in specs:
        times, star, rest = spec.partition("*")
        yield from [rest] * int(times) if star and times.isdecimal() else [spec]


def _machine(spec: str) -> str:
    """Where the worker of an execution spec runs; equal for workers on one machine."""
    keys = dict(part.partition("=")[::2] for part in spec.split("//"))
    if "via" not in keys and "popen" in keys:
        return _HERE
    where = "via" if "via" in keys else next((key for key in ("ssh", "vagrant_ssh", "socket") if key in keys), "")
    return f"{where}={keys.get(where, '').partition(':')[0]}"
