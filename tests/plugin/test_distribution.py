"""Under pytest-xdist: a cache in each worker, one summary in the controller, whatever becomes of the workers."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Suite

FOUR_TESTS = """
@pytest.mark.parametrize("n", range(4))
def test_x(sway_backend, n):
    sway_backend(dummy("a"))
"""


def test_one_summary_counts_what_all_workers_did(suite: Suite) -> None:
    result = suite.run(FOUR_TESTS, "-n2", "--dist=each")
    result.assert_outcomes(passed=8)
    result.stdout.re_match_lines_random(
        [
            r"=+ sway =+",
            r"dummy:a      2     6     \d\.\d\d        0       0",
            r"saved about \d\.\d s of loading, over all workers",
            r"gw0: 1 load, 3 hits, \d\.\d\d s; peak: 1 backend",
            r"gw1: 1 load, 3 hits, \d\.\d\d s; peak: 1 backend",
        ]
    )
    assert sorted(suite.events()) == 2 * ["close a"] + 2 * ["load a"]


def test_nothing_is_printed_when_no_test_used_a_backend(any_suite: Suite) -> None:
    result = any_suite.run("""
def test_x(): pass
def test_y(sway_backend): pass
""")
    result.assert_outcomes(passed=2)
    assert "= sway =" not in result.stdout.str()


def test_a_leak_fails_the_run(any_suite: Suite) -> None:
    result = any_suite.run("""
def test_x(sway_backend):
    sway_backend(dummy("a")).leaky = True
""")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "leaked:*3.0 MiB of dummy:a were still in memory after its close",
            "the run fails because weights leaked (sway_on_leak = error)",
        ]
    )


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", 'sway_backend(dummy("killed"))'])
@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_worker_that_crashed_is_named_and_the_rest_is_printed(suite: Suite, death: str, restarts: str) -> None:
    result = suite.run(
        f"""
import os, signal

def test_dies(sway_backend):
    {death}

@pytest.mark.parametrize("n", range(3))
def test_lives(sway_backend, n):
    sway_backend(dummy("a"))
""",
        "-n2",
        f"--max-worker-restart={restarts}",
    )
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.re_match_lines_random(
        [
            r"=+ sway =+",
            r"gw\d: crashed \(Not properly terminated\); what it did is not counted",
            r"gw\d: 1 load, ",
        ]
    )
