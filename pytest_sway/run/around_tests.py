"""pytest's hooks around tests and fixtures, registered when the tests are collected."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.cache.owners import Owner
from pytest_sway.system.imports import restore_modules

if TYPE_CHECKING:
    from pytest_sway.run.current import CurrentRun

__tracebackhide__ = True

_errors = pytest.StashKey[list[BaseException]]()


class AroundTests:
    """The hooks of one run.

    They are registered last. So those with ``tryfirst`` are around those of a ``conftest.py``.
    """

    def __init__(self, run: CurrentRun) -> None:
        self._run = run
        self._owners: dict[pytest.FixtureDef[Any], Owner] = {}
        self._asked: dict[pytest.FixtureDef[Any], set[pytest.FixtureDef[Any]]] = {}
        """By a wider fixture, those that its set-up asked for, unless its test had asked for them before."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """Make the fixture own the leases that are taken in its set-up; they end after its own teardown."""
        if request.scope == "function":
            return (yield)
        owner = Owner(f"fixture {request.fixturename!r} of {request.node.nodeid or 'the session'}")
        self._owners[fixturedef] = owner
        request.addfinalizer(partial(self._end, owner))
        around, self._run.running = self._run.running, owner
        before = self._asked_for(request)
        try:
            return (yield)
        finally:
            self._run.running = around
            self._asked[fixturedef] = self._asked_for(request) - before

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Make the test own its leases, and refuse a ``sway_spec`` marker without specs."""
        self._run.running = Owner(item.nodeid)
        for marker in item.iter_markers("sway_spec"):
            if not marker.args or marker.kwargs:
                pytest.fail(
                    f"{item.nodeid}: the marker sway_spec takes one or more specs, as in"
                    f" @pytest.mark.sway_spec({{'base': ...}}); found {_arguments(marker)}.",
                    pytrace=False,
                )

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        """Compare the used models after the test's own fixtures have ended, so that the right test gets the error."""
        try:
            result = yield
        except (KeyboardInterrupt, pytest.exit.Exception):
            with suppress(Exception):  # of ours: it would take the place of the one that ends the run
                self._end_test()
            raise
        except BaseException:
            self._end_test()
            raise
        self._end_test()
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Refuse a test whose wider fixture holds a backend that an earlier test changed.

        Its body may ask for fixtures, too, and pytest calls no hook for one that is set up already. So these are
        checked when the body has passed.
        """
        told: set[str] = set()
        self._check_fixtures(item, told)
        result = yield
        self._check_fixtures(item, told)
        return result

    @pytest.hookimpl
    def pytest_assertion_pass(self) -> None:
        """Settle the margins of an assertion that passed.

        pytest looks for this hook before a test starts. With it, pytest also explains assertions that pass.
        """
        if self._run.regression is not None:
            self._run.regression.assertion_passed()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Clear a failed test's traceback once it is reported, so that it does not keep a model in memory.

        pytest keeps the last traceback until the next test's call.
        """
        try:
            return (yield)
        finally:
            errors = item.stash.get(_errors, [])
            if errors and self._run.used is not None and not item.config.getoption("usepdb", False):
                from pytest_sway.system.garbage import forget_frames

                for error in errors:
                    forget_frames(error)
            errors.clear()

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Name the docs entry of an error, and subtract load seconds from the duration of the test that loaded.

        The wrappers of a ``conftest.py`` are around this one, and see the report as it will be.
        """
        if call.excinfo is not None:
            from pytest_sway.errors import name_page

            name_page(call.excinfo.value)
            item.stash.setdefault(_errors, []).append(call.excinfo.value)
        session = self._run.used
        loaded, imported = session.take_load_seconds() if session else (0.0, 0.0)
        for name, seconds in (("sway_load_seconds", loaded), ("sway_import_seconds", imported)):
            if seconds:
                item.user_properties.append((name, round(seconds, 3)))
        report = yield
        report.duration = max(0.0, report.duration - loaded - imported)
        return report

    def _check_fixtures(self, item: pytest.Item, told: set[str]) -> None:
        if self._run.used is not None:
            self._run.used.hygiene.check_fixtures(partial(self._wider_fixtures, item), told)

    def _wider_fixtures(self, item: pytest.Item) -> dict[Owner, str]:
        """Return the names of the wider fixtures that a test uses, by the owners of their leases."""
        used = self._asked_for(getattr(item, "_request", None))
        definitions = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
        for name, overridden in definitions.items():
            for definition in reversed(overridden):  # the last one is used, and the one before it, if that asks for it
                if definition in self._owners:
                    used.add(definition)
                if name not in definition.argnames:
                    break
        new = used
        while new := {each for one in new for each in self._asked.get(one, ())} - used:
            used |= new
        return {self._owners[each]: each.argname for each in used}

    def _asked_for(self, request: Any) -> set[pytest.FixtureDef[Any]]:
        """Return the wider fixtures that a test has asked for until now, by ``getfixturevalue()`` too."""
        return {each for each in getattr(request, "_fixture_defs", {}).values() if each in self._owners}

    def _end_test(self) -> None:
        restore_modules()  # a pytest run inside this test may have removed some
        session = self._run.used
        error = session.end_test(self._run.running) if session is not None else None
        if error is not None:
            raise error

    def _end(self, owner: Owner) -> None:
        if self._run.used is not None:
            self._run.used.cache.end(owner)


def _arguments(marker: pytest.Mark) -> str:
    return "no arguments" if not marker.kwargs else f"the keyword arguments {', '.join(marker.kwargs)}"
