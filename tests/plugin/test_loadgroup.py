"""Runs under ``-n 2 --dist loadgroup``: which worker loads which base, and unchanged node ids."""

from __future__ import annotations

import json
from collections import Counter
from xml.etree import ElementTree

import pytest

from tests.plugin.conftest import MENDED, WORST_ORDER, Suite
from tests.tiny import make_base

pytest.importorskip("xdist")

LOADGROUP = ("-n2", "--dist=loadgroup", "--sway-cache-size=1")


def shares(suite: Suite) -> list[str]:
    """Return the bases of each worker's tests, in the order of the tests."""
    return ["".join(what.partition(" ")[0] for what in tests) for tests in suite.ran().values()]


def last_failed(suite: Suite) -> set[str]:
    return set(json.loads((suite.pytester.path / ".pytest_cache/v/cache/lastfailed").read_text()))


FAILED = {f"test_suite.py::test_x[b{number}]" for number in range(3)}


def test_each_base_is_loaded_once_and_the_workers_share_the_tests(suite: Suite) -> None:
    result = suite.run_apart(WORST_ORDER, *LOADGROUP)
    result.assert_outcomes(passed=9, failed=3)
    assert suite.loads() == Counter("abcd")
    assert sorted(shares(suite), key=min) == ["aaabbb", "cccddd"]


def test_groups_are_cut_over_what_is_left_when_all_is_deselected(suite: Suite) -> None:
    suite.run_apart(WORST_ORDER, *LOADGROUP, "-k", "a0 or a1 or b0 or b1").assert_outcomes(passed=2, failed=2)
    assert sorted(shares(suite)) == ["aa", "bb"]


def test_a_plugin_may_have_the_tests_ordered_once_more(suite: Suite) -> None:
    suite.pytester.makepyfile(
        twice="""
import pytest

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session, config, items):
    if hasattr(config, "workerinput") and not hasattr(config, "again"):
        config.again = True
        config.hook.pytest_collection_modifyitems(session=session, config=config, items=items)
"""
    )
    suite.run_apart(WORST_ORDER, *LOADGROUP, "-p", "twice").assert_outcomes(passed=9, failed=3)


def test_groups_of_the_user_are_kept(suite: Suite) -> None:
    result = suite.run_apart(
        WORST_ORDER
        + """
@pytest.mark.xdist_group("mine")
@EACH
def test_mine(base, uses): pass

@pytest.mark.xdist_group(name="mine")
def test_without_spec(sway_backend):
    note(f"run {os.environ['PYTEST_XDIST_WORKER']} mine")
""",
        *LOADGROUP,
        "-k",
        "mine or without",
    )
    result.assert_outcomes(passed=13)
    assert shares(suite) == ["aaabbbcccdddmine"]


def test_no_groups_are_made_when_switched_off(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\nsway_reorder = false\n")
    suite.run_apart(WORST_ORDER, *LOADGROUP).assert_outcomes(passed=9, failed=3)
    assert suite.loads().total() > 4


def test_failed_tests_are_remembered_by_their_node_ids(suite: Suite) -> None:
    result = suite.run_apart(WORST_ORDER, *LOADGROUP, "-v")
    assert last_failed(suite) == FAILED
    result.stdout.no_fnmatch_line("*pytest-sway-*")
    suite.run(WORST_ORDER, "--lf").assert_outcomes(failed=3)


def test_last_failed_runs_alone_under_workers(suite: Suite) -> None:
    suite.run(WORST_ORDER)
    suite.run_apart(WORST_ORDER, *LOADGROUP, "--lf").assert_outcomes(failed=3)
    suite.run_apart(MENDED, *LOADGROUP, "--lf").assert_outcomes(passed=3)
    assert last_failed(suite) == set()


def test_failed_first_is_first_on_each_worker(suite: Suite) -> None:
    suite.run(WORST_ORDER)
    (suite.pytester.path / "events.txt").unlink()
    suite.run_apart(WORST_ORDER, *LOADGROUP, "--ff").assert_outcomes(passed=9, failed=3)
    assert sorted(shares(suite), key=min) == ["bbbaaa", "cccddd"]


def test_stepwise_goes_on_where_it_stopped(suite: Suite) -> None:
    suite.run_apart(WORST_ORDER, *LOADGROUP, "--sw")
    (suite.pytester.path / "events.txt").unlink()
    suite.run(MENDED, "--sw").assert_outcomes(passed=9, deselected=3)


def test_junit_names_are_those_of_a_run_without_workers(suite: Suite) -> None:
    def names(*args: str) -> set[tuple[str | None, str | None]]:
        suite.run_apart(WORST_ORDER, *args, "--junitxml=report.xml")
        cases = ElementTree.parse(suite.pytester.path / "report.xml").iter("testcase")
        return {(case.get("classname"), case.get("name")) for case in cases}

    assert names(*LOADGROUP) == names()


def test_a_test_that_kills_its_worker_is_reported_by_its_node_id(suite: Suite) -> None:
    result = suite.run_apart(
        WORST_ORDER
        + """
@spec("a")
def test_dies(uses):
    os._exit(1)
""",
        *LOADGROUP,
        "--max-worker-restart=0",
    )
    result.stdout.fnmatch_lines(["worker 'gw?' crashed while running 'test_suite.py::test_dies'"])
    result.stdout.no_fnmatch_line("*pytest-sway-*")
    assert "test_suite.py::test_dies" in last_failed(suite)


def test_a_plugin_that_shuffles_wins_under_workers_too(suite: Suite) -> None:
    suite.pytester.makepyfile(
        shuffler="""
import random

def pytest_collection_modifyitems(items):
    random.Random(3).shuffle(items)
"""
    )
    suite.run_apart(WORST_ORDER, *LOADGROUP, "-p", "shuffler").assert_outcomes(passed=9, failed=3)
    found = shares(suite)
    assert [(len(share), len(set(share))) for share in found] == [(6, 2), (6, 2)]
    assert any(share != "".join(sorted(share)) for share in found)


def test_the_summary_advises_to_name_specs_where_workers_loaded_the_same_base(pytester: pytest.Pytester) -> None:
    test = f"""
def test_x(sway_backend):
    sway_backend({{"base": {str(make_base(pytester.path / "base"))!r}}})
"""
    pytester.makepyfile(test_1=test, test_2=test)
    result = pytester.runpytest_subprocess("-n2", "--dist=loadfile", timeout=300)
    result.stdout.fnmatch_lines(["several workers loaded the same base; without --dist, *"])
