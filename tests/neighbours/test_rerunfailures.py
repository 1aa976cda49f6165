"""A test that pytest-rerunfailures runs again has its comparisons once, with the verdicts of a run without it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plugin.test_compare import SUITE
from tests.plugin.test_reports import by_name, written

BODY = """
from pathlib import Path

def test_better(sway_compare):
    assert sway_compare(FACTS, canned(0.5), canned(0.0), name="better").low > 0

def test_worse(sway_compare):
    assert sway_compare(FACTS, canned(-0.5), canned(0.0), name="worse").high >= 0

def test_flaky(sway_compare):
    tried = Path(__file__).with_name("tried")
    shift = 0.1 if tried.exists() else -0.1
    tried.touch()
    assert sway_compare(FACTS, canned(shift), canned(0.0), name="flaky").low > 0
"""


def _run(pytester: pytest.Pytester, *args: str) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Run the suite in two workers, and return the outcomes, and the comparisons by name."""
    common = ("-p", "no:randomly", "-p", "no:cacheprovider", "-n", "2", "--sway-json=run.json")
    result = pytester.runpytest_subprocess(*common, *args, timeout=120)
    record = written(pytester)
    assert record["run"]["exit_status"] == pytest.ExitCode.TESTS_FAILED
    assert len(by_name(record)) == len(record["comparisons"])
    return result.parseoutcomes(), by_name(record)


def test_the_last_tries_have_the_verdicts_of_a_run_without_reruns(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\nminversion = "8.0"\n')
    pytester.makepyfile(test_suite=SUITE + BODY)
    outcomes, again = _run(pytester, "--reruns", "1", "--sway-markdown=run.md")
    assert {name: outcomes[name] for name in ("passed", "failed", "rerun")} == {"passed": 2, "failed": 1, "rerun": 2}
    assert [(name, each["outcome"], each["verdict"], len(each["rows"])) for name, each in again.items()] == [
        ("better", "passed", None, 12),
        ("flaky", "passed", None, 12),
        ("worse", "failed", "refuted", 12),
    ]
    text = (pytester.path / "run.md").read_text()
    assert [text.count(f"| {name} | ") for name in again] == [1, 1, 1]
    outcomes, once = _run(pytester)
    assert "rerun" not in outcomes
    assert again == once


CRASHES = """
import os
from pathlib import Path
import pytest

@pytest.mark.parametrize("n", range(6))
def test_many(n):
    tried = Path(__file__).with_name("tried")
    if n == 3 and not tried.exists():
        tried.touch()
        os._exit(3)
"""


@pytest.mark.parametrize(("reruns", "failed"), [((), 1), (("--reruns=2",), 0)], ids=["once", "again"])
def test_a_worker_s_crash_ends_no_run(pytester: pytest.Pytester, reruns: tuple[str, ...], failed: int) -> None:
    pytester.makepyfile(CRASHES)
    common = ("-p", "no:randomly", "-p", "no:cacheprovider", "-n", "2")
    outcomes = pytester.runpytest_subprocess(*common, *reruns, timeout=120).parseoutcomes()
    assert (outcomes["passed"], outcomes.get("failed", 0)) == (6 - failed, failed)
