"""Runs under ``-n`` without ``--dist``: which worker runs what, and that nothing runs twice or never."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.plugin.conftest import MENDED, WIDE, WORST_ORDER, Suite

pytest.importorskip("xdist")

SEES = """
def pytest_xdist_node_collection_finished(ids):
    print("collected", sorted(ids))

def pytest_unconfigure(config):
    session = config.pluginmanager.getplugin("dsession")
    if session is not None:
        print("scheduler", type(session.sched).__name__)
"""
"""A plugin that prints the name of the scheduler, and what workers send."""


def names(suite: Suite) -> list[str]:
    return sorted(what.partition(" ")[2] for tests in suite.ran().values() for what in tests)


def scheduler_of(suite: Suite, source: str, *args: str) -> str:
    suite.pytester.makepyfile(sees=SEES)
    result = suite.run_apart(source, "-p", "sees", "-s", "--max-worker-restart=0", *args)
    (line,) = (line for line in result.outlines if line.startswith("scheduler "))
    return line.removeprefix("scheduler ")


def in_cache(suite: Suite, name: str) -> Any:
    return json.loads(Path(suite.pytester.path / ".pytest_cache/v" / name).read_text())


def loads_are_slow(suite: Suite) -> None:
    """Let pytest's cache say that a load took long in an earlier run; the fakes load in no time."""
    folder = suite.pytester.path / ".pytest_cache/v/sway"
    folder.mkdir(parents=True)
    (folder / "durations").write_text(json.dumps({"tests": {}, "loads": {"some base": 60.0}}))


ALL = sorted(f"test_x[{base}{number}]" for base in "abcd" for number in range(3))
ONE = 'def test_x(sway_backend): sway_backend(dummy("a"))'


def test_each_base_is_loaded_once_and_a_worker_goes_on_with_its_base(suite: Suite) -> None:
    loads_are_slow(suite)
    result = suite.run(WORST_ORDER, "-n2")
    result.assert_outcomes(passed=9, failed=3)
    assert suite.loads() == Counter("abcd")
    assert names(suite) == ALL
    for tests in suite.ran().values():
        bases = [what[0] for what in tests]
        assert bases == sorted(bases, key=bases.index)


def test_workers_share_one_base(suite: Suite) -> None:
    result = suite.run(
        WORST_ORDER.replace('"abcd" * 3', '"a" * 12'),
        "-n2",
    )
    result.assert_outcomes(passed=12)
    assert suite.loads() == {"a": 2}
    result.stdout.fnmatch_lines(["1 load let workers share the tests of a base; one alone would have taken longer"])


# --- who asked for what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "scheduler"),
    [
        (("-n2",), "SwayScheduling"),
        (("-n4", "--maxprocesses=2"), "SwayScheduling"),
        (("-n1",), "LoadScheduling"),
        (("-n2", "--dist=load"), "LoadScheduling"),
        (("-n2", "--dist", "worksteal"), "WorkStealingScheduling"),
        (("-d", "--tx=2*popen"), "LoadScheduling"),
        (("-n2", "-o", "sway_reorder=false"), "LoadScheduling"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_explicit_choice_is_kept(suite: Suite, args: tuple[str, ...], scheduler: str) -> None:
    assert scheduler_of(suite, ONE, *args) == scheduler


def test_a_choice_in_the_ini_file_is_kept(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\naddopts = --dist load\n")
    assert scheduler_of(suite, ONE, "-n2") == "LoadScheduling"


def test_a_scheduler_of_the_project_is_kept(suite: Suite) -> None:
    suite.write(ONE)
    conftest = suite.pytester.path / "conftest.py"
    conftest.write_text(
        conftest.read_text()
        + """
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling
    return LoadFileScheduling(config, log)
"""
    )
    assert scheduler_of(suite, ONE, "-n2") == "LoadFileScheduling"


def test_other_plugins_see_node_ids_alone(suite: Suite) -> None:
    suite.pytester.makepyfile(sees=SEES)
    result = suite.run_apart(WORST_ORDER, "-p", "sees", "-s", "-n2", "-k", "a0 or b0")
    assert result.outlines.count("collected ['test_suite.py::test_x[a0]', 'test_suite.py::test_x[b0]']") == 2


# --- tests of all kinds -----------------------------------------------------------------------------------------------


def test_tests_without_specs_and_of_two_bases_run_once_too(suite: Suite) -> None:
    result = suite.run(
        MENDED
        + """
@pytest.mark.parametrize("n", range(10))
def test_plain(n, request):
    note(f"run {os.environ.get('PYTEST_XDIST_WORKER')} - {request.node.name}")

@pytest.mark.sway_spec(dummy("a"), dummy("c"))
def test_two(sway_backend, request):
    bases = [sway_backend(dummy(base)).spec.base for base in "ac"]
    note(f"run {os.environ.get('PYTEST_XDIST_WORKER')} a {request.node.name}")
""",
        "-n2",
    )
    result.assert_outcomes(passed=23)
    assert names(suite) == sorted([*ALL, "test_two", *(f"test_plain[{n}]" for n in range(10))])


def test_groups_of_the_user_stay_together(suite: Suite) -> None:
    result = suite.run(
        MENDED
        + """
@pytest.mark.xdist_group("mine")
@EACH
def test_mine(base, uses): pass
""",
        "-n2",
    )
    result.assert_outcomes(passed=24)
    shares = [[what for what in tests if "test_mine" in what] for tests in suite.ran().values()]
    assert sorted(map(len, shares)) == [0, 12]


def test_a_wider_fixture_is_set_up_once_in_each_worker(suite: Suite) -> None:
    result = suite.run(
        WIDE
        + """
@pytest.mark.sway_spec(dummy("wide"))
@pytest.mark.parametrize("n", range(8))
def test_x(backend, n):
    note("used")
""",
        "-n2",
    )
    result.assert_outcomes(passed=8)
    assert suite.loads() == {"wide": 2}
    assert suite.events().count("fixture ends") == 2
    assert suite.events().count("used") == 8


# --- runs that end early, and workers that crash ----------------------------------------------------------------------


@pytest.mark.parametrize("args", [("-x",), ("--maxfail=2",)], ids=" ".join)
def test_a_run_that_stops_early_runs_nothing_twice(suite: Suite, args: tuple[str, ...]) -> None:
    result = suite.run(WORST_ORDER.replace('base != "b"', "False"), "-n2", *args)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert len(names(suite)) == len(set(names(suite))) < 12


DIES = """
@spec("a")
@pytest.mark.parametrize("n", range(2))
def test_dies(uses, n):
    os._exit(1)
"""


def test_replacements_run_what_crashed_workers_had(suite: Suite) -> None:
    result = suite.run(MENDED + DIES, "-n2")
    result.assert_outcomes(passed=12, failed=2)
    assert names(suite) == sorted([*ALL, "test_dies[0]", "test_dies[1]"])
    result.stdout.fnmatch_lines(["worker 'gw?' crashed while running 'test_suite.py::test_dies[[]0]'"])
    assert set(in_cache(suite, "cache/lastfailed")) == {f"test_suite.py::test_dies[{n}]" for n in range(2)}


READS_THE_SCHEDULER = """
def pytest_handlecrashitem(sched):
    note(f"scheduler of {sched.config.rootpath.name}, {sched.log is not None}")
"""


def test_properties_of_any_form_end_no_run(suite: Suite) -> None:
    result = suite.run(
        """
@pytest.mark.parametrize("value", [{"ticket": "X-1"}, ("a", "b", "c"), 7])
def test_x(request, value):
    request.node.user_properties.append(value)
""",
        "-n2",
    )
    result.assert_outcomes(passed=3)


def test_plugins_find_the_scheduler_s_config_and_log_as_in_those_of_pytest_xdist(suite: Suite) -> None:
    conftest = suite.pytester.path / "conftest.py"
    conftest.write_text(conftest.read_text() + READS_THE_SCHEDULER)
    suite.run(MENDED + DIES, "-n2").assert_outcomes(passed=12, failed=2)
    assert suite.events().count(f"scheduler of {suite.pytester.path.name}, True") == 2


def test_without_replacements_the_run_ends(suite: Suite) -> None:
    result = suite.run(MENDED + DIES, "-n2", "--max-worker-restart=0")
    assert result.parseoutcomes()["failed"] >= 1
    result.stdout.fnmatch_lines(["*worker gw? crashed and worker restarting disabled*"])
    assert len(names(suite)) == len(set(names(suite)))


def test_last_failed_runs_alone(suite: Suite) -> None:
    suite.run(WORST_ORDER, "-n2")
    (suite.pytester.path / "events.txt").unlink()
    suite.run(MENDED, "-n2", "--lf").assert_outcomes(passed=3)
    assert names(suite) == ["test_x[b0]", "test_x[b1]", "test_x[b2]"]
    assert in_cache(suite, "cache/lastfailed") == {}


def test_workers_with_different_tests_are_reported(suite: Suite) -> None:
    result = suite.run(
        """
import os

@pytest.mark.sway_spec(dummy("a"))
@pytest.mark.parametrize("name", [os.environ["PYTEST_XDIST_WORKER"]])
def test_x(sway_backend, name): pass
""",
        "-n2",
    )
    assert result.ret != 0
    result.stdout.fnmatch_lines(["Different tests were collected between gw? and gw?*"])
    assert not suite.events()


# --- durations --------------------------------------------------------------------------------------------------------


def test_durations_are_kept_for_the_next_run(suite: Suite) -> None:
    suite.run(WORST_ORDER, "-n2")
    kept = in_cache(suite, "sway/durations")
    assert sorted(kept["tests"]) == [f"test_suite.py::{name}" for name in ALL if "[b" not in name]
    assert all(0.0 <= seconds < 60.0 for seconds in kept["tests"].values())
    (suite.pytester.path / "events.txt").unlink()
    suite.run(MENDED, "-n2").assert_outcomes(passed=12)
    assert names(suite) == ALL
    assert len(in_cache(suite, "sway/durations")["tests"]) == 12


def test_a_base_that_took_long_in_an_earlier_run_comes_first(suite: Suite) -> None:
    suite.run(MENDED, "-n2", "-k", "c or d")
    cached = suite.pytester.path / ".pytest_cache/v/sway/durations"
    cached.write_text(json.dumps({"tests": {f"test_suite.py::test_x[d{n}]": 60.0 for n in range(3)}, "loads": {}}))
    (suite.pytester.path / "events.txt").unlink()
    suite.run(MENDED, "-n2").assert_outcomes(passed=12)
    firsts = {tests[0][0] for tests in suite.ran().values()}
    assert "d" in firsts


def test_without_pytests_cache_all_runs_too(suite: Suite) -> None:
    suite.run(MENDED, "-n2", "-p", "no:cacheprovider").assert_outcomes(passed=12)
    assert names(suite) == ALL
