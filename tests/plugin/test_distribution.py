"""Under pytest-xdist, each worker has a cache, and the controller prints one summary, even if workers crash."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import FAKES, Suite

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


@pytest.mark.parametrize("restarts", ["0", "1"])
@pytest.mark.parametrize(
    ("death", "loading"),
    [("os.kill(os.getpid(), signal.SIGKILL)", ""), ('sway_backend(dummy("killed"))', " while it loaded dummy:killed")],
    ids=["in a test", "in a load"],
)
def test_a_worker_that_crashed_is_named_and_the_rest_is_printed(
    suite: Suite, death: str, loading: str, restarts: str
) -> None:
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
            rf"gw\d: crashed \(Not properly terminated\){loading}; its counts are missing",
            r"gw\d: 1 load, ",
        ]
    )


def test_when_the_only_load_kills_its_worker_the_summary_still_says_so(suite: Suite) -> None:
    result = suite.run('def test_x(sway_backend): sway_backend(dummy("killed"))', "-n1", "--max-worker-restart=0")
    result.stdout.fnmatch_lines(
        [
            "*= sway =*",
            "gw0: crashed (Not properly terminated) while it loaded dummy:killed; its counts are missing",
        ]
    )


@pytest.mark.parametrize("dist", ["load", "loadscope", "loadfile", "loadgroup", "worksteal", "each"])
def test_every_way_to_distribute_gives_one_summary_and_closes_all(suite: Suite, dist: str) -> None:
    result = suite.run(FOUR_TESTS, "-n2", f"--dist={dist}")
    result.assert_outcomes(passed=8 if dist == "each" else 4)
    assert result.stdout.str().count("= sway =") == 1
    assert suite.events().count("close a") == suite.events().count("load a") > 0


@pytest.mark.parametrize("args", [("-x",), ("--maxfail=2",)])
def test_a_run_that_stops_early_has_its_summary_and_closes_all(suite: Suite, args: tuple[str, ...]) -> None:
    result = suite.run(
        """
@pytest.mark.parametrize("n", range(40))
def test_x(sway_backend, n):
    sway_backend(dummy("a"))
    assert False
""",
        "-n2",
        *args,
    )
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*= sway =*", "dummy:a*", "gw*: 1 load, *"])
    assert suite.events().count("close a") == suite.events().count("load a") > 0


def test_the_errors_of_each_worker_stand_in_the_one_summary_with_its_name(suite: Suite) -> None:
    result = suite.run(
        """
def test_x(sway_backend, worker_id):
    sway_backend(dummy("a")).dirty.append(f"by {worker_id}")

def test_y(sway_backend):
    sway_backend(dummy("bad-close"))
""",
        "-n2",
        "--dist=each",
    )
    for worker in ("gw0", "gw1"):
        result.stdout.fnmatch_lines(
            [
                f"left changed: {worker}: test_suite.py::test_x left a shared model changed:",
                f"    by {worker}",
            ]
        )
        result.stdout.fnmatch_lines([f"failed to close: {worker}: *RuntimeError: cannot close*"])


def test_the_controller_imports_neither_torch_nor_the_cache(suite: Suite) -> None:
    suite.pytester.makepyfile(
        looks="""
import sys

def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        heavy = {"torch", "transformers", "peft", "pytest_sway.cache.backend_cache"}
        print("imported", sorted(heavy & set(sys.modules)))
"""
    )
    result = suite.run_apart(FOUR_TESTS, "-n2", "-p", "looks", "-s")
    result.assert_outcomes(passed=4)
    assert "imported []" in result.stdout.str()


def test_what_the_workers_shared_is_gone_after_the_run(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(suite.pytester.mkdir("temp")))
    result = suite.run_apart(
        """
import os

def test_x(sway_backend, request):
    sway_backend(dummy("a"))
    assert os.path.isdir(request.config.workerinput["pytest_sway"]["folder"])
""",
        "-n2",
    )
    result.assert_outcomes(passed=1)
    assert not list((suite.pytester.path / "temp").glob("pytest-sway-*"))


def test_a_worker_in_another_folder_finds_named_specs_where_its_copy_of_the_project_is(suite: Suite) -> None:
    project = suite.pytester.mkdir("project")
    suite.pytester.mkdir("elsewhere")
    (project / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nminversion = "8.0"\n'
        '[tool.pytest-sway.specs.v3]\nkind = "dummy"\nbase = "named"\nadapter = "runs/v3"\n'
    )
    (project / "conftest.py").write_text(FAKES)
    (project / "test_copied.py").write_text("""
from pathlib import Path

def test_x(sway_backend, pytestconfig):
    copy = Path(__file__).parent
    assert copy.parent.name == "elsewhere" and Path.cwd() == copy.parent
    assert sway_backend("v3").spec.adapter == copy / "runs/v3"
    assert sway_backend({"kind": "dummy", "base": "b", "adapter": "project/runs"}).spec.adapter == copy / "runs"
""")
    result = suite.pytester.runpytest_inprocess(
        "--dist=load", "--tx=popen//chdir=elsewhere", "--rsyncdir=project", project
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gw0: 2 loads, *"])
