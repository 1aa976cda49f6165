"""Every backend is closed at the end of the session, even after errors and interrupts."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway import plugin
from tests.plugin.conftest import Suite

LOADS = """
def test_one(sway_backend):
    sway_backend(dummy("a"))
    {ending}

def test_two(sway_backend):
    sway_backend(dummy("b"))
    {ending}
"""


@pytest.mark.parametrize(
    ("ending", "args", "code", "events"),
    [
        ("pass", (), pytest.ExitCode.OK, ["load a", "load b", "close a", "close b"]),
        ("assert False", ("-x",), pytest.ExitCode.TESTS_FAILED, ["load a", "close a"]),
        ("assert False", ("--maxfail=2",), pytest.ExitCode.TESTS_FAILED, ["load a", "load b", "close a", "close b"]),
        ("pytest.exit('enough', returncode=7)", (), 7, ["load a", "close a"]),
        ("raise KeyboardInterrupt", (), pytest.ExitCode.INTERRUPTED, ["load a", "close a"]),
        ("raise SystemExit(3)", (), pytest.ExitCode.TESTS_FAILED, ["load a", "load b", "close a", "close b"]),
    ],
)
def test_all_is_closed(suite: Suite, ending: str, args: tuple[str, ...], code: int, events: list[str]) -> None:
    result = suite.run_apart(LOADS.format(ending=ending), *args)
    assert result.ret == code
    assert suite.events() == events


def test_ctrl_c_in_a_load_closes_the_others_and_leaves_nothing(suite: Suite) -> None:
    result = suite.run_apart("""
def test_one(sway_backend):
    sway_backend(dummy("a"))

def test_two(sway_backend):
    sway_backend(dummy("ctrl-c"))
""")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert suite.events() == ["load a", "load ctrl-c", "close a"]


def test_an_internal_error_closes_all(suite: Suite) -> None:
    suite.pytester.makepyfile(
        breaks="""
def pytest_runtest_logfinish(nodeid):
    raise RuntimeError("a plugin is broken")
"""
    )
    result = suite.run_apart(LOADS.format(ending="pass"), "-p", "breaks")
    assert result.ret == pytest.ExitCode.INTERNAL_ERROR
    assert suite.events() == ["load a", "close a"]


def test_session_fixtures_end_before_their_backends_are_closed(any_suite: Suite) -> None:
    result = any_suite.run("""
@pytest.fixture(scope="session")
def backend(sway_cache):
    with sway_cache.lease(dummy("a")) as backend:
        yield backend
        note("fixture ends")

def test_x(backend):
    pass
""")
    result.assert_outcomes(passed=1)
    assert any_suite.events() == ["load a", "fixture ends", "close a"]


def test_a_close_that_raises_fails_no_test_and_is_reported(suite: Suite) -> None:
    result = suite.run("""
def test_one(sway_backend):
    sway_backend(dummy("bad-close"))

def test_two(sway_backend):
    sway_backend(dummy("b"))
    sway_backend(dummy("c"))
""")
    result.assert_outcomes(passed=2)
    assert suite.events() == ["load bad-close", "load b", "close bad-close", "load c", "close b", "close c"]
    result.stdout.fnmatch_lines(["failed to close: closing dummy:bad-close failed: RuntimeError: cannot close"])


def test_the_last_hooks_of_a_conftest_come_after_the_closes(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
import pytest

def pytest_sway_backend_evicted(spec):
    print("EVICTED")

@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    print("LAST")

def pytest_terminal_summary(terminalreporter):
    terminalreporter.line("SUMMARY")
""")
    pytester.makepyfile('def test_x(sway_backend): sway_backend({"kind": "dummy", "base": "a", "adapter": "b"})')
    result = pytester.runpytest("-s")
    result.stdout.fnmatch_lines(["*EVICTED", "LAST", "SUMMARY", "*= sway =*"])


def test_the_copy_of_the_terminal_is_closed_even_if_the_last_close_is_interrupted() -> None:
    class Interrupted:
        def close(self) -> None:
            raise KeyboardInterrupt

    config, descriptor = SimpleNamespace(stash=pytest.Stash()), os.dup(2)
    run: Any = SimpleNamespace(used=Interrupted())
    config.stash[plugin._run] = run
    config.stash[plugin._terminal_fd] = descriptor
    with pytest.raises(KeyboardInterrupt):
        plugin.pytest_unconfigure(config)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
