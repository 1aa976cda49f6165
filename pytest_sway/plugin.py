"""The pytest plugin: hooks and fixtures that look up this run's state and delegate.

Nothing heavy is imported here, and the cache itself only when a test first asks for a backend.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.cache.owners import Owner
from pytest_sway.run.ordering import Collection
from pytest_sway.run.settings import SwaySettings, add_options, asks_for_offline, resolve_settings
from pytest_sway.system.frames import forget_frames
from pytest_sway.system.imports import restore_modules

if TYPE_CHECKING:
    from pytest_sway.cache.backend_cache import BackendCache
    from pytest_sway.cache.entries import CachedBackend
    from pytest_sway.run.comparing import Compared, SwayCompare
    from pytest_sway.run.records import Records
    from pytest_sway.run.session import SwayBackend, SwaySession
    from pytest_sway.spec.model_spec import ModelSpec
    from pytest_sway.spec.parsing import SpecLike

_settings = pytest.StashKey[SwaySettings]()
_session = pytest.StashKey["SwaySession"]()
_terminal_fd = pytest.StashKey[int]()
_running = pytest.StashKey[Owner]()
_errors = pytest.StashKey[list[BaseException]]()
_compared = pytest.StashKey[list["Compared"]]()
_changed = pytest.StashKey[str]()
_records = pytest.StashKey["Records"]()


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
        "sway_spec(*specs): the model specs that a test uses; with exactly one, sway_backend() needs no argument.",
    )
    config.stash[_settings] = settings = resolve_settings(config)
    if config.getoption("sway_set"):
        from pytest_sway.run.named_specs import check_changes

        config.stash[_changed] = check_changes(config)
    config.stash[_running] = Owner("the session")
    config.stash[_terminal_fd] = os.dup(2)  # capture replaces descriptor 2 while a test runs, not yet now
    if settings.reorder:
        config.pluginmanager.register(Collection(settings), "pytest_sway_collection")
    if getattr(config.option, "tx", None):  # pytest-xdist's workers
        from pytest_sway.run.controller import Controller, distributes

        if distributes(config):
            config.pluginmanager.register(Controller(config, settings), "pytest_sway_controller")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close what an interrupted teardown left, and the terminal."""
    if _session in config.stash:
        config.stash[_session].close()
    if _terminal_fd in config.stash:
        os.close(config.stash[_terminal_fd])
        del config.stash[_terminal_fd]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Show what is in force."""
    changed = config.stash.get(_changed, None)
    recording = "sway: recording the scores of tests that pass" if config.getoption("sway_record") else None
    return [config.stash[_settings].header(), *(line for line in (changed, recording) if line is not None)]


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sway_backend(request: pytest.FixtureRequest) -> Iterator[SwayBackend]:
    """Call it with a spec to get a live differential backend, which stays loaded until the test's teardown.

    ``sway_backend({"base": "org/name", "adapter": "runs/v3"})`` gives an object whose ``as_base()`` and
    ``as_finetuned()`` open views on one set of loaded weights.
    """
    with _sway(request.config).backends_for(request.node.nodeid, _marked(request.node)) as backends:
        yield backends


@pytest.fixture
def sway_compare(request: pytest.FixtureRequest) -> SwayCompare:
    """Call it with questions, a candidate and a baseline to get how much more the candidate scores, in plain numbers.

    ``assert sway_compare(questions, "candidate", "baseline").low > -0.1``: the candidate is shown to lose less than
    0.1. A side is a view, a spec or a configured name. Without a baseline, it compares with the scores that
    ``--sway-record`` has written beside the test.
    """
    from pytest_sway.run.comparing import Compared, comparing
    from pytest_sway.run.records import Records

    config = request.config
    records = request.node.stash[_records] = Records(request.node, recording=config.getoption("sway_record"))
    session, made = _sway(config), list[Compared]()
    config.stash[_compared] = request.node.stash[_compared] = made
    return comparing(
        partial(session.backends_for, request.node.nodeid, ()),
        session.cache.resolve,
        records=records,
        confidence=config.stash[_settings].confidence,
        drift=config.stash[_settings].drift,
        made=made.append,
    )


@pytest.fixture(scope="session")
def sway_cache(request: pytest.FixtureRequest) -> BackendCache:
    """The cache behind ``sway_backend``, for wider fixtures.

    ``with sway_cache.lease(spec) as backend: yield backend`` pins a backend for as long as the fixture lives. A lease
    ends with the test in which it is taken, or with the wider fixture during whose set-up it is.
    """
    return _sway(request.config).cache


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, object, object]:
    """Let leases that are taken while a wider fixture is set up end with it, after all of its own teardown."""
    if request.scope == "function":
        return (yield)
    stash = request.config.stash
    owner = Owner(f"fixture {request.fixturename!r} of {request.node.nodeid or 'the session'}")
    request.addfinalizer(partial(_end, request.config, owner))
    around, stash[_running] = stash[_running], owner
    try:
        return (yield)
    finally:
        stash[_running] = around


# --- a test's life ----------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Name the test to the cache, and refuse a marker that says nothing."""
    item.config.stash[_running] = Owner(item.nodeid)
    for marker in item.iter_markers("sway_spec"):
        if not marker.args or marker.kwargs:
            pytest.fail(
                f"{item.nodeid}: the marker sway_spec takes one or more specs, as in"
                f" @pytest.mark.sway_spec({{'base': ...}}); found {_arguments(marker)}.",
                pytrace=False,
            )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Compare what a test and its fixtures have used, once they have ended, so that the right test gets the error.

    Only then the scores of a test that passed are recorded.
    """
    try:
        result = yield
    finally:
        restore_modules()  # which a run inside of this test may have taken away
        session = _used(item.config)
        error = session.end_test(item.config.stash[_running]) if session is not None else None
        if error is not None:
            raise error
    records: Records | None = item.stash.get(_records, None)
    if records is not None and (line := records.end()) is not None:
        item.user_properties.append(("sway_recorded", line))
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Refuse a test whose wider fixture holds a backend that an earlier test has changed."""
    session = _used(item.config)
    if session is not None:
        session.check_fixtures(getattr(item, "funcargs", {}))


def pytest_assertrepr_compare(config: pytest.Config, op: str, left: object, right: object) -> None:
    """Note the margin of a failing assertion about a comparison; how it is shown is left to pytest."""
    for compared in config.stash.get(_compared, ()):
        compared.asserted(op, left, right)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let go of what a failed test's traceback holds, once it is reported, so that the next load finds room.

    pytest keeps the last traceback until the next test is called.
    """
    try:
        return (yield)
    finally:
        errors = item.stash.get(_errors, [])
        if _used(item.config) is not None and not item.config.getoption("usepdb", False):
            for error in errors:
                forget_frames(error)
        errors.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Name the page of an error, and charge the seconds of a load as such, not to the test that came first."""
    if call.excinfo is not None:
        from pytest_sway.errors import name_page

        name_page(call.excinfo.value)
        item.stash.setdefault(_errors, []).append(call.excinfo.value)
    session = _used(item.config)
    seconds = session.take_load_seconds() if session else 0.0
    if seconds:
        item.user_properties.append(("sway_load_seconds", round(seconds, 3)))
    compared = item.stash.get(_compared, ())
    if compared:
        from pytest_sway.report.comparisons import set_properties

        set_properties(item.user_properties, compared)
    report = yield
    report.duration = max(0.0, report.duration - seconds)
    if report.passed and report.when == "call" and _records in item.stash:
        item.stash[_records].passed = True
    if report.failed and report.when == "call":
        report.sections += [("sway_compare", each.report()) for each in compared]
    return report


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any], report: pytest.TestReport | pytest.CollectReport
) -> None:
    """Name the page of an error that fails a collection, such as a spec among the parameters that is wrong."""
    if isinstance(node, pytest.Collector) and call.excinfo is not None:
        from pytest_sway.errors import name_page

        if name_page(call.excinfo.value):
            report.longrepr = node.repr_failure(call.excinfo)


# --- the end of the run -----------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close every backend; session fixtures have ended by now, however the run ended."""
    config = session.config
    if (sway := _used(config)) is not None:
        from pytest_sway.run.controller import publish

        config.stash[_running] = Owner("the session's end")
        sway.close()
        publish(config, sway.stats)
        if config.stash[_settings].fails_run(sway.stats.leaks) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was compared, and what happened, if a test used a backend."""
    if any(report for reports in terminalreporter.stats.values() for report in reports if _compares(report)):
        from pytest_sway.report.comparisons import write_comparisons

        write_comparisons(terminalreporter)
    if config.getoption("sway_record"):
        from pytest_sway.run.records import write_recorded

        write_recorded(terminalreporter)
    if (sway := _used(config)) is not None:
        from pytest_sway.report.summary import write_summary

        fails = config.stash[_settings].fails_run(sway.stats.leaks)
        write_summary(terminalreporter, sway.stats, fails=fails)


# --- the run's state --------------------------------------------------------------------------------------------------


class _Hooks:
    """The hooks ``pytest_sway_*``, as the session calls them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def build(self, spec: ModelSpec) -> Any | None:
        return self._config.hook.pytest_sway_build_backend(spec=spec, config=self._config)

    def builds(self) -> bool:
        return bool(self._config.hook.pytest_sway_build_backend.get_hookimpls())

    def loaded(self, cached: CachedBackend) -> None:
        self._config.hook.pytest_sway_backend_loaded(cached=cached, config=self._config)

    def evicted(self, spec: ModelSpec) -> None:
        self._config.hook.pytest_sway_backend_evicted(spec=spec, config=self._config)


def _used(config: pytest.Config) -> SwaySession | None:
    """The session, if a test has asked for it."""
    return config.stash.get(_session, None)


def _sway(config: pytest.Config) -> SwaySession:
    """The session, made on first use."""
    if _session not in config.stash:
        from pytest_sway.run.controller import load_progress, weights_folder
        from pytest_sway.run.named_specs import named_specs
        from pytest_sway.run.secrets import SecretsHidden
        from pytest_sway.run.session import SwaySession

        config.pluginmanager.register(SecretsHidden(config), "pytest_sway_secrets")
        config.stash[_session] = SwaySession(
            config.stash[_settings],
            _Hooks(config),
            named_specs(config),
            load_progress(config, _terminal(config)),
            owner=lambda: config.stash[_running],
            share_weights=weights_folder(config),
        )
    return config.stash[_session]


def _compares(report: object) -> bool:
    return any(name == "sway_compare" for name, _ in getattr(report, "user_properties", ()))


def _end(config: pytest.Config, owner: Owner) -> None:
    if (session := _used(config)) is not None:
        session.cache.end(owner)


def _terminal(config: pytest.Config) -> Any | None:
    """The terminal past pytest's capture, or ``None`` where there is none."""
    descriptor = config.stash.get(_terminal_fd, None)
    if descriptor is None or not os.isatty(descriptor):
        return None
    return open(descriptor, "w", encoding="utf-8", closefd=False)


def _marked(item: pytest.Item) -> tuple[SpecLike, ...]:
    """The specs of the closest marker ``sway_spec``."""
    marker = item.get_closest_marker("sway_spec")
    return () if marker is None else marker.args


def _arguments(marker: pytest.Mark) -> str:
    return "no arguments" if not marker.kwargs else f"the keyword arguments {', '.join(marker.kwargs)}"
