"""A run's settings for itself and its workers: offline mode, threads, devices in turn."""

from __future__ import annotations

import os

import pytest

from pytest_sway.system.machine import WORKER_SLOT, usable_processors
from pytest_sway.system.offline import VARIABLES
from tests.plugin.conftest import Suite

CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", WORKER_SLOT)


@pytest.fixture(autouse=True)
def nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *CHOSEN):
        monkeypatch.delenv(name, raising=False)


def test_offline_is_set_before_any_conftest_is_imported_and_shown(suite: Suite) -> None:
    suite.pytester.mkdir("sub").joinpath("conftest.py").write_text(
        'import os\nFOUND = os.environ["HF_HUB_OFFLINE"], os.environ["TRANSFORMERS_OFFLINE"]\n'
    )
    suite.pytester.path.joinpath("sub/test_sub.py").write_text("""
def test_x(pytestconfig):
    (conftest,) = (p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "FOUND"))
    assert conftest.FOUND == ("1", "1")
""")
    result = suite.pytester.runpytest_inprocess("--sway-offline", "sub")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["sway: *, offline"])


@pytest.mark.parametrize(("ini", "offline"), [("true", True), ("false", False)])
def test_offline_can_be_an_ini_value(suite: Suite, ini: str, offline: bool) -> None:
    suite.pytester.makeini(f"[pytest]\nsway_offline = {ini}\n")
    result = suite.run(f"import os\n\ndef test_x(): assert ('HF_HUB_OFFLINE' in os.environ) is {offline}")
    result.assert_outcomes(passed=1)


def test_a_bad_ini_value_is_named_as_such(suite: Suite) -> None:
    suite.pytester.makeini("[pytest]\nsway_offline = perhaps\n")
    result = suite.run("def test_x(): pass")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: ini value sway_offline: must be true or false; " in result.stderr.str()


@pytest.mark.parametrize("source", ["def test_x(): pass", "import nowhere"], ids=["passes", "fails to collect"])
def test_a_run_leaves_the_environment_as_it_was(any_suite: Suite, source: str) -> None:
    before = dict(os.environ)
    any_suite.run(source, "--sway-offline")
    assert {name: os.environ.get(name) for name in (*VARIABLES, *CHOSEN)} == {
        name: before.get(name) for name in (*VARIABLES, *CHOSEN)
    }


def test_a_run_that_a_conftest_breaks_leaves_the_environment_as_it_was(suite: Suite) -> None:
    suite.pytester.makeconftest("raise RuntimeError('broken')")
    assert suite.run("def test_x(): pass", "--sway-offline").ret == pytest.ExitCode.USAGE_ERROR
    assert not set(VARIABLES) & set(os.environ)


WORKER = """
import os

def test_x(worker_id):
    print(*(f"{{name}}={{os.environ.get(name)}}" for name in {names!r}), sep=";")
    assert False
"""


def test_workers_share_the_processors_are_numbered_and_go_offline(suite: Suite) -> None:
    names = ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", WORKER_SLOT)
    result = suite.run(WORKER.format(names=names), "-n2", "--dist=each", "--sway-offline")
    threads = max(1, usable_processors() // 2)
    for slot in range(2):
        result.stdout.fnmatch_lines(
            [f"OMP_NUM_THREADS={threads};TOKENIZERS_PARALLELISM=false;HF_HUB_OFFLINE=1;{WORKER_SLOT}={slot}"]
        )
    result.stdout.fnmatch_lines([f"sway: OMP_NUM_THREADS={threads} in each of 2 workers"])


def test_threads_that_the_user_has_chosen_stay(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    result = suite.run(WORKER.format(names=CHOSEN[:2]), "-n1")
    result.stdout.fnmatch_lines(["OMP_NUM_THREADS=None;MKL_NUM_THREADS=7"])
    result.stdout.no_fnmatch_line("sway: OMP_NUM_THREADS=*")


def test_the_environment_of_an_execution_spec_wins(suite: Suite) -> None:
    result = suite.run(
        WORKER.format(names=CHOSEN),
        "--dist=each",
        "--tx=popen//env:OMP_NUM_THREADS=5",
        "--tx=popen//env:TOKENIZERS_PARALLELISM=true",
    )
    threads = max(1, usable_processors() // 2)
    result.stdout.fnmatch_lines_random(
        [
            f"OMP_NUM_THREADS=5;MKL_NUM_THREADS=None;TOKENIZERS_PARALLELISM=false;{WORKER_SLOT}=0",
            f"OMP_NUM_THREADS={threads};MKL_NUM_THREADS=None;TOKENIZERS_PARALLELISM=true;{WORKER_SLOT}=1",
        ]
    )


def test_a_worker_that_replaces_another_has_its_number(suite: Suite) -> None:
    result = suite.run(
        f"""
import os, signal
from pathlib import Path

def test_x():
    print("slot", os.environ[{WORKER_SLOT!r}])
    first = not os.path.exists("died")
    Path("died").touch()
    if first and os.environ[{WORKER_SLOT!r}] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

def test_y():
    assert False, os.environ["PYTEST_XDIST_WORKER"] + " has " + os.environ[{WORKER_SLOT!r}]
""",
        "-n1",
    )
    result.stdout.fnmatch_lines(["*AssertionError: gw1 has 0*"])


def test_torch_in_a_worker_uses_its_share_and_code_can_choose_another(suite: Suite) -> None:
    result = suite.run(
        f"""
def test_x():
    import torch
    assert torch.get_num_threads() == {max(1, usable_processors() // 2)}
    torch.set_num_threads(3)
    assert torch.get_num_threads() == 3
""",
        "-n2",
    )
    result.assert_outcomes(passed=1)
