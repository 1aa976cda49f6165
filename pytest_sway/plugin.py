"""The pytest plugin: hooks and fixtures that look up this run's state and delegate.

Every start of pytest imports this module and what it imports. So that is little: the settings and the hooks' names. The
rest is imported when it is first used, the hooks around tests when the tests are collected, and the cache when a test
first asks for a backend.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.run.settings import SwaySettings, add_options, asks_for_offline, asks_for_reports, resolve_settings

if TYPE_CHECKING:
    from pytest_sway.cache.backend_cache import BackendCache
    from pytest_sway.run.current import CurrentRun
    from pytest_sway.run.regression.comparing import SwayCompare
    from pytest_sway.run.serving.requests import SwayBackend
    from pytest_sway.spec.parsing import SpecLike

_settings = pytest.StashKey[SwaySettings]()
_terminal_fd = pytest.StashKey[int]()
_changed = pytest.StashKey[str]()
_run = pytest.StashKey["CurrentRun"]()


# --- configuration ----------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options and ini values."""
    add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks ``pytest_sway_*``."""
    from pytest_sway.run import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Go offline before a conftest.py imports anything heavy."""
    if asks_for_offline(early_config):
        from pytest_sway.system.offline import go_offline

        early_config.add_cleanup(go_offline())


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the settings; a bad value ends the run here, before collection."""
    config.addinivalue_line(
        "markers",
        "sway_spec(*specs): the specs that the test uses; with exactly one, sway_backend() needs no argument.",
    )
    config.stash[_settings] = settings = resolve_settings(config)
    if config.getoption("sway_set"):
        from pytest_sway.run.named_specs import check_changes

        config.stash[_changed] = check_changes(config)
    config.stash[_terminal_fd] = os.dup(2)  # capture replaces descriptor 2 while a test runs, not yet now
    if settings.reorder:
        config.pluginmanager.register(_collection(config, settings), "pytest_sway_collection")
    controller = None
    if getattr(config.option, "tx", None):  # pytest-xdist's workers
        from pytest_sway.run.controller import Controller, distributes

        if distributes(config):
            controller = Controller(config, settings)
            config.pluginmanager.register(controller, "pytest_sway_controller")
            _current(config).collect()
    if asks_for_reports(config) and not hasattr(config, "workerinput") and not config.getoption("collectonly"):
        from pytest_sway.run.reports import Reports

        run = _current(config)
        workers = run.reports if controller is None else controller.reports
        config.pluginmanager.register(Reports(config, run.collect(), workers), "pytest_sway_reports")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the backends that an interrupted teardown left open, and the terminal."""
    try:
        run = config.stash.get(_run, None)
        if run is not None and run.used is not None:
            run.used.close()
    finally:
        if _terminal_fd in config.stash:
            os.close(config.stash[_terminal_fd])
            del config.stash[_terminal_fd]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Show the settings, and the named specs that ``--sway-set`` changed."""
    changed = config.stash.get(_changed, None)
    recording = "sway: recording the scores of tests that pass" if config.getoption("sway_record") else None
    return [config.stash[_settings].header(), *(line for line in (changed, recording) if line is not None)]


def pytest_make_parametrize_id(config: pytest.Config, val: object) -> str | None:
    """Name a parameter that is a spec after what it loads, such as ``org/base+runs/v3``; the same in each clone."""
    if isinstance(val, str | bytes | int | float | None):
        return None
    from pytest_sway.run.ordering import is_spec

    if not is_spec(val):
        return None
    from pytest_sway.spec.parsing import label_as_written

    try:
        return label_as_written(val, config.rootpath).replace(" ", "")  # type: ignore[arg-type] # is_spec says so
    except Exception:  # the test itself says what is wrong with it, or it is something else of any kind
        return None


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sway_backend(request: pytest.FixtureRequest) -> Iterator[SwayBackend]:
    """``sway_backend({"base": "org/name", "adapter": "runs/v3"})`` gives a backend until the test's teardown.

    Its ``as_base()`` and ``as_finetuned()`` open views on one set of loaded weights.
    """
    requests = _current(request.config).session().requests
    with requests.backends_for(request.node.nodeid, _marked(request.node)) as backends:
        yield backends


@pytest.fixture
def sway_compare(request: pytest.FixtureRequest) -> SwayCompare:
    """Call it with questions, a candidate and a baseline to learn how much higher the candidate scores.

    ``assert sway_compare(questions, "candidate", "baseline").low > -0.1`` shows that the candidate loses less than 0.1.
    A side is a view, a spec or a configured name. Without a baseline, it compares with the scores that
    ``--sway-record`` has written beside the test.
    """
    return _current(request.config).comparing().sway_compare(request)


@pytest.fixture(scope="session")
def sway_cache(request: pytest.FixtureRequest) -> BackendCache:
    """The cache behind ``sway_backend``, for wider fixtures.

    In a fixture, ``with sway_cache.lease(spec) as backend: yield backend`` pins a backend until the fixture's teardown.
    A lease that is not released ends with the test or wider fixture that took it.
    """
    return _current(request.config).session().cache


# --- the run ----------------------------------------------------------------------------------------------------------


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any], report: pytest.TestReport | pytest.CollectReport
) -> None:
    """Name the docs entry of an error that fails a collection, such as a malformed spec among parameters."""
    if isinstance(node, pytest.Collector) and call.excinfo is not None:
        from pytest_sway.errors import name_page

        if name_page(call.excinfo.value):
            report.longrepr = node.repr_failure(call.excinfo)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Register the hooks around tests; a run that only collects needs none."""
    config = session.config
    if not config.getoption("collectonly"):
        from pytest_sway.run.around_tests import AroundTests
        from pytest_sway.run.registering import registered

        registered(config, "pytest_sway_tests", partial(AroundTests, _current(config)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close every backend; session fixtures have ended by now, even after an interrupt."""
    run = session.config.stash.get(_run, None)
    if run is not None:
        run.end(session)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the comparisons, and the summary if a test used a backend."""
    run = _current(config) if config.getoption("sway_record") else config.stash.get(_run, None)
    if run is not None:
        run.summarize(terminalreporter)


# --- the run's state --------------------------------------------------------------------------------------------------


def _collection(config: pytest.Config, settings: SwaySettings) -> Any:
    """Return the hooks that order tests; those of a run without pytest-xdist import the rest if they need it."""
    if not (getattr(config.option, "tx", None) or hasattr(config, "workerinput")):
        return _Order(settings)
    from pytest_sway.run.ordering import Collection

    return Collection(settings)


class _Order:
    """The hook of `Collection` that a run without pytest-xdist needs."""

    def __init__(self, settings: SwaySettings) -> None:
        self._settings = settings

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, object, object]:
        """Put tests of the same model together, if a marker or a parameter may name a spec."""
        if not any("sway_spec" in item.keywords or hasattr(item, "callspec") for item in items):
            return (yield)
        from pytest_sway.run.ordering import Collection

        return (yield from Collection(self._settings).pytest_collection_modifyitems(config, items))


def _current(config: pytest.Config) -> CurrentRun:
    """Return the run's state, creating it on first use."""
    if _run not in config.stash:
        from pytest_sway.run.current import CurrentRun

        config.stash[_run] = CurrentRun(config, config.stash[_settings], config.stash[_terminal_fd])
    return config.stash[_run]


def _marked(item: pytest.Item) -> tuple[SpecLike, ...]:
    """Return the specs of the closest ``sway_spec`` marker."""
    marker = item.get_closest_marker("sway_spec")
    return () if marker is None else marker.args
