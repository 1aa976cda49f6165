"""Mutations and leaks: the right test gets the blame, and the next one a clean backend."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Suite

MUTATES = """
def test_clean(sway_backend):
    sway_backend(dummy("a"))

def test_dirty(sway_backend):
    sway_backend(dummy("a")).dirty.append("parameter w: contents changed")

def test_next(sway_backend):
    assert sway_backend(dummy("a")).dirty == []
"""

LEAKS = """
def test_leaks(sway_backend):
    sway_backend(dummy("a")).leaky = True

def test_next(sway_backend):
    sway_backend(dummy("b"))
"""


def test_the_test_that_mutates_gets_the_error_and_the_next_a_clean_backend(suite: Suite) -> None:
    result = suite.run(MUTATES)
    result.assert_outcomes(passed=3, errors=1)
    assert suite.events() == ["load a", "close a", "load a", "close a"]
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_dirty*",
            "*MutationError: test_suite.py::test_dirty left a shared model changed:",
            "*dummy:a:",
            "*parameter w: contents changed",
            "left changed: test_suite.py::test_dirty left*",
        ]
    )


def test_mutations_can_warn_or_be_ignored(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\nsway_on_mutation = warn\n")
    result = suite.run(MUTATES, "-W", "default")
    result.assert_outcomes(passed=3, warnings=1)
    result.stdout.fnmatch_lines(["*SwayWarning: test_suite.py::test_dirty left a shared model changed:*"])
    suite.pytester.makeini("[pytest]\nsway_on_mutation = ignore\n")
    result = suite.run(MUTATES)
    result.assert_outcomes(passed=2, failed=1)


def test_a_mutation_through_a_wider_fixture_is_blamed_on_the_test_not_on_the_fixture(suite: Suite) -> None:
    result = suite.run("""
@pytest.fixture(scope="module")
def backend(sway_cache):
    with sway_cache.lease(dummy("wide")) as backend:
        yield backend

def test_clean(backend):
    pass

def test_dirty(backend):
    backend.dirty.append("module h: training mode on")

def test_after(sway_backend, backend):
    assert sway_backend(dummy("wide")) is not backend
""")
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_dirty*"])
    assert suite.events().count("load wide") == 2
    assert suite.events().count("close wide") == 2


def test_who_shares_what_was_changed_is_closed_too_and_not_blamed(suite: Suite) -> None:
    result = suite.run("""
def test_dirty(sway_backend, sway_cache):
    shared = ["parameter w: contents changed"]
    sway_cache.get_or_load(dummy("b")).backend.dirty = shared
    sway_backend(dummy("a")).dirty = shared

def test_b(sway_backend):
    assert sway_backend(dummy("b")).dirty == []
""")
    result.assert_outcomes(passed=2, errors=1)
    assert suite.events().count("load b") == 2


def test_a_leak_is_reported_with_holder_and_user_and_fails_the_run(suite: Suite) -> None:
    result = suite.run(LEAKS, "--sway-cache-size=1")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "leaked: 3.0 MiB of dummy:a were still in memory after its close",
            "*held by module test_x: global KEEP",
            "*used by test_suite.py::test_leaks",
        ]
    )


@pytest.mark.parametrize("policy", ["warn", "ignore"])
def test_a_leak_can_warn_or_be_ignored(suite: Suite, policy: str) -> None:
    suite.pytester.makeini(f"[pytest]\nsway_on_leak = {policy}\n")
    result = suite.run(LEAKS, "--sway-cache-size=1")
    assert result.ret == pytest.ExitCode.OK
    assert ("leaked: 3.0 MiB of dummy:a" in result.stdout.str()) == (policy == "warn")


def test_a_comparison_that_raises_is_the_test_s_error_and_every_fixture_still_ends(suite: Suite) -> None:
    result = suite.run("""
@pytest.fixture(scope="module")
def backend(sway_cache):
    with sway_cache.lease(dummy("wide")) as backend:
        yield backend
        note("fixture ends")

def test_x(backend, sway_backend):
    def changes():
        raise RuntimeError("cannot compare")
    backend.changes = changes
    sway_backend(dummy("a"))
""")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*RuntimeError: cannot compare"])
    assert suite.events() == ["load wide", "load a", "fixture ends", "close wide", "close a"]
