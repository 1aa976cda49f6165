"""The pytest plugin: options, hooks and fixtures, which look up this run's state and delegate.

Every start of pytest imports this module, so it imports no other one until there is a need. A value of an option, or a
report, needs the settings. The hooks around tests are imported when the tests are collected, and the cache when a test
first asks for a backend. (PYTEST_DONT_REWRITE: this module keeps its assertions as they are.)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_sway import Finder

if TYPE_CHECKING:
    from pytest_sway.cache.backend_cache import BackendCache
    from pytest_sway.cache.entries import CachedBackend
    from pytest_sway.protocols import DifferentialBackend
    from pytest_sway.run.current import CurrentRun
    from pytest_sway.run.regression.comparing import SwayCompare
    from pytest_sway.run.serving.requests import SwayBackend
    from pytest_sway.run.settings import SwaySettings
    from pytest_sway.spec.model_spec import ModelSpec
    from pytest_sway.spec.parsing import SpecLike

sys.meta_path[:] = (finder for finder in sys.meta_path if not isinstance(finder, Finder))  # each run has its own

# Annotated, since StashKey[...]() takes longer.
_settings: pytest.StashKey[SwaySettings] = pytest.StashKey()
_terminal_fd: pytest.StashKey[int] = pytest.StashKey()
_changed: pytest.StashKey[str] = pytest.StashKey()
_run: pytest.StashKey[CurrentRun] = pytest.StashKey()


# --- options ----------------------------------------------------------------------------------------------------------

INI: Final = {
    "sway_cache_size": "the most backends loaded at one time, in each process (default: 2)",
    "sway_cache_memory": "the most memory for loaded weights, in each process, such as 8GiB (default: no bound)",
    "sway_device": "the device of specs with 'auto' (default: the best)",
    "sway_dtype": "the dtype of specs with 'auto': auto, fp16, bf16, fp32 (default: fp32 on a CPU)",
    "sway_on_mutation": "if a test leaves a shared model changed: error, warn, ignore (default: error)",
    "sway_on_leak": "if weights stay in memory after their backend was closed: error, warn, ignore (default: error)",
    "sway_on_base_mismatch": "if an adapter was trained on another base: error, warn, ignore (default: warn)",
    "sway_reorder": "run tests of the same model together, and with pytest-xdist in few workers (default: true)",
    "sway_offline": "use only files on this machine and ask no hub (default: false)",
    "sway_share_weights": "share converted weights among the pytest-xdist workers of a machine: auto, off"
    " (default: auto)",
    "sway_score_cache": "the most memory for the remembered answers of each base, or off (default: 64MiB)",
    "sway_confidence": "the confidence of the intervals of sway_compare (default: 0.99)",
    "sway_drift": "how far the base may move since scores were recorded, in their unit (default: 0.05)",
}
"""The help of each ini value. `run.settings` holds its default and reads it."""

OPTIONS: Final = {"sway_cache_size": "N", "sway_cache_memory": "SIZE", "sway_device": "DEVICE", "sway_dtype": "DTYPE"}
"""The ini values that have an option too, with its metavar."""

REPORTS: Final = {
    "sway_json": "write the run's comparisons, every row of them, and its loads to a file, as JSON",
    "sway_markdown": "append the table of comparisons, and the worst texts of failures, to a file, as Markdown",
    "sway_html": "write a page to look at, with the differences, tokens and loads, to a file, as HTML",
}
"""The files that a run can write, by the destination of their option."""

HEADER: Final = "sway: cache of 2, no memory bound, device auto, dtype auto, on mutation error, on leak error"
"""The header of a run in which no setting is given, so that the settings need not be imported for it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options and ini values."""
    group = parser.getgroup("sway", "pytest-sway: fine-tuned models")
    for name, text in INI.items():
        flag: Any = "bool" if name in ("sway_reorder", "sway_offline") else None
        parser.addini(name, text, type=flag, default=None)
    for name, metavar in OPTIONS.items():
        group.addoption(_option(name), dest=name, metavar=metavar, help=INI[name])
    group.addoption("--sway-offline", action="store_true", default=None, help=INI["sway_offline"])
    for name, text in REPORTS.items():
        group.addoption(_option(name), dest=name, metavar="PATH", help=text)
    group.addoption(
        "--sway-set",
        action="append",
        metavar="NAME.FIELD=VALUE",
        help="change or add a named spec for this run, such as candidate.adapter=runs/v4; may be repeated",
    )
    group.addoption(
        "--sway-record",
        action="store_true",
        help="record the scores of comparisons without a baseline, of each test that passes, in a file beside it",
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- configuration ----------------------------------------------------------------------------------------------------


class HookSpecs:
    """The hooks that you can implement in a conftest.py or a plugin."""

    @staticmethod
    @pytest.hookspec(firstresult=True)
    def pytest_sway_build_backend(spec: ModelSpec, config: pytest.Config) -> DifferentialBackend | None:
        """Build the backend of ``spec``, or return ``None`` to leave it to other plugins and to pytest-sway.

        Called once for each load, in the thread that asked. An error that is no `pytest_sway.SwayError` is wrapped in
        one. The backend must have ``as_base()`` and ``as_finetuned()``. It is leased and evicted like any other, and
        may have:

        * ``close()``, called once, when the backend is evicted or the session ends;
        * ``changes()``, called after each test: returns one line for each change since the load;
        * ``leak()``, called after the close: returns ``None``, or an object with ``nbytes``, the bytes still in
          memory, and ``holders``, one line for each chain of references that holds them;
        * ``sizes()``, for ``--sway-cache-memory``: returns a mapping from parts to bytes. Backends that share a part
          use the same key for it.

        Args:
            spec: The spec to load. For kinds hf and mlx, its device and dtype are resolved; for others they may be
                auto.
            config: The run's configuration.
        """

    @staticmethod
    def pytest_sway_backend_loaded(cached: CachedBackend, config: pytest.Config) -> None:
        """Called after a load; ``cached`` holds the backend, its spec, its key and the seconds of its load.

        An error raised here is reported in the summary and fails no test.
        """

    @staticmethod
    def pytest_sway_backend_evicted(spec: ModelSpec, config: pytest.Config) -> None:
        """Called after a close: to make room, because a test changed the backend, or at the session's end.

        An error raised here is reported in the summary and fails no test.
        """


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks ``pytest_sway_*``."""
    pluginmanager.add_hookspecs(HookSpecs)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Keep pytest's rewriting from the package, and go offline before a conftest.py imports anything heavy."""
    finder = Finder()
    finder.insert()
    early_config.add_cleanup(finder.remove)
    if asks_for_offline(early_config):
        from pytest_sway.system.offline import go_offline

        early_config.add_cleanup(go_offline())


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the settings if one is given; a bad value ends the run here, before collection."""
    config.addinivalue_line(
        "markers",
        "sway_spec(*specs): the specs that the test uses; with exactly one, sway_backend() needs no argument.",
    )
    if any(_is_given(config, name) for name in INI):
        _resolved(config)
    if config.getoption("sway_set"):
        from pytest_sway.run.named_specs import check_changes

        config.stash[_changed] = check_changes(config)
    config.stash[_terminal_fd] = os.dup(2)  # capture replaces descriptor 2 while a test runs, not yet now
    # After all installed plugins, so that it reorders first and a plugin that shuffles has the last word.
    config.pluginmanager.register(_Order(), "pytest_sway_order")
    controller = None
    if getattr(config.option, "tx", None):  # pytest-xdist's workers
        from pytest_sway.run.controller import Controller, distributes

        if distributes(config):
            controller = Controller(config, _resolved(config))
            config.pluginmanager.register(controller, "pytest_sway_controller")
            _current(config).collect()
    asks_for_reports = any(config.getoption(name) is not None for name in REPORTS)
    if asks_for_reports and not hasattr(config, "workerinput") and not config.getoption("collectonly"):
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
    settings = config.stash.get(_settings, None)
    header = HEADER if settings is None else settings.header()
    return [header, *(line for line in (changed, recording) if line is not None)]


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


def asks_for_offline(early_config: pytest.Config) -> bool:
    """Return whether a run should be offline, before its settings are resolved; a bad value is reported then."""
    if early_config.known_args_namespace.sway_offline:
        return True
    try:
        return bool(early_config.getini("sway_offline"))
    except (TypeError, ValueError, pytest.UsageError):
        return False


def _is_given(config: pytest.Config, name: str) -> bool:
    """Return whether an option or ini value has a value, which may be a bad one."""
    if config.getoption(name, None) is not None:  # some settings have no option
        return True
    try:
        return config.getini(name) is not None
    except (TypeError, ValueError, pytest.UsageError):
        return True


def _resolved(config: pytest.Config) -> SwaySettings:
    """Return the settings, resolving them on first use."""
    if _settings not in config.stash:
        from pytest_sway.run.settings import resolve_settings

        config.stash[_settings] = resolve_settings(config)
    return config.stash[_settings]


class _Order:
    """The hook that orders tests."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, object, object]:
        """Put tests of the same model together, if a marker or a parameter may name a spec."""
        if any("sway_spec" in item.keywords or hasattr(item, "callspec") for item in items):
            from pytest_sway.run.ordering import reorder

            if _resolved(config).reorder:
                reorder(config, items, _resolved(config))
        return (yield)


def _current(config: pytest.Config) -> CurrentRun:
    """Return the run's state, creating it on first use."""
    if _run not in config.stash:
        from pytest_sway.run.current import CurrentRun

        config.stash[_run] = CurrentRun(config, _resolved(config), config.stash[_terminal_fd])
    return config.stash[_run]


def _marked(item: pytest.Item) -> tuple[SpecLike, ...]:
    """Return the specs of the closest ``sway_spec`` marker."""
    marker = item.get_closest_marker("sway_spec")
    return () if marker is None else marker.args
