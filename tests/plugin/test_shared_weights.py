"""All workers of a machine share one copy of converted weights, in a folder that is removed after the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny import make_adapter, make_base

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there, weights are read and not mapped")
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SUITE = """
import os
import signal
from pathlib import Path

import pytest

SPEC = {{"base": {base!r}, "adapter": {adapter!r}, "dtype": "fp32"}}
TEMPORARY = Path({temporary!r})
WORKER = os.environ.get("PYTEST_XDIST_WORKER")

def score(backend):
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        return [view.logprob_of("the sun rises in the", " east") for view in (base, tuned)]

def folders():
    return sorted(str(path) for path in TEMPORARY.glob("pytest-sway-*"))

def copies():
    return [path for path in TEMPORARY.glob("pytest-sway-*/*/*/model.safetensors") if ".unfinished" not in str(path)]

def tell(line):
    with open("told.txt", "a") as file:
        file.write(f"{{line}}\\n")

def meet(place):
    "Wait until the other process is there too."
    os.close(os.open(place, os.O_RDONLY if WORKER == "gw1" else os.O_WRONLY))
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("half")
    make_adapter(root / "adapter", make_base(root / "base", dtype="bfloat16"))
    return root


class Runs:
    """Runs suites with a temporary directory of their own."""

    def __init__(self, pytester: pytest.Pytester, models: Path, temporary: Path) -> None:
        self.pytester = pytester
        self.temporary = temporary
        self._head = SUITE.format(base=str(models / "base"), adapter=str(models / "adapter"), temporary=str(temporary))

    def run(self, source: str, *args: str) -> pytest.RunResult:
        self.write(source)
        return self.pytester.runpytest_subprocess(*args, timeout=120)

    def write(self, source: str) -> None:
        self.pytester.makepyfile(test_suite=self._head + source)

    def told(self) -> list[str]:
        return (self.pytester.path / "told.txt").read_text().splitlines()

    def left(self) -> list[Path]:
        return list(self.temporary.glob("pytest-sway-*"))


@pytest.fixture
def runs(pytester: pytest.Pytester, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    return Runs(pytester, models, temporary)


@pytest.fixture
def start(runs: Runs) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start pytest in a process group of its own, as a terminal does."""
    children = []

    def start(*args: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


SCORES = """
def test_scores(sway_backend):
    tell(score(sway_backend(SPEC)))
"""


@linux_only
def test_workers_map_one_copy_and_score_as_one_process_does(runs: Runs) -> None:
    maps = "    assert len(copies()) == 1\n    assert str(copies()[0]) in Path('/proc/self/maps').read_text()\n"
    runs.run(SCORES + maps, "-n2", "--dist=each").assert_outcomes(passed=2)
    assert runs.left() == []
    runs.run(SCORES, "-p", "no:xdist").assert_outcomes(passed=1)
    assert len(runs.told()) == 3
    assert len(set(runs.told())) == 1


@pytest.mark.parametrize("args", [("-n1",), ("-n2", "--override-ini=sway_share_weights=off")], ids=" ".join)
def test_a_single_worker_or_off_writes_no_copy(runs: Runs, args: tuple[str, ...]) -> None:
    runs.run(SCORES + "    assert copies() == []\n", *args).assert_outcomes(passed=1)


@pytest.mark.parametrize("args", [("-p", "no:xdist"), ("-n0",)], ids=" ".join)
def test_without_workers_there_is_no_folder(runs: Runs, args: tuple[str, ...]) -> None:
    runs.run("def test_alone(sway_cache): assert folders() == []", *args).assert_outcomes(passed=1)


def test_workers_in_another_folder_share_too(runs: Runs) -> None:
    runs.write(SCORES + "    assert len(copies()) == 1\n")
    suite = runs.pytester.mkdir("suite")
    runs.pytester.path.joinpath("test_suite.py").rename(suite / "test_suite.py")
    elsewhere = [f"popen//chdir={runs.pytester.mkdir(name)}" for name in ("one", "two")]
    result = runs.pytester.runpytest_subprocess(
        "--dist=each", *(f"--tx={place}" for place in elsewhere), f"--rsyncdir={suite}", suite, timeout=120
    )
    result.assert_outcomes(passed=2)
    assert runs.left() == []


SHARED = """
def portion():
    "This process's portion of the mapped weights in kilobytes: a page that several map is divided among them."
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = "pytest-sway-" in line
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1])
    return total

def test_pages(sway_backend):
    if WORKER == "gw1":
        meet("first")
    with sway_backend(SPEC).as_base() as view:
        model = view.model
        assert sum(float(parameter.sum()) for parameter in model.parameters())
        if WORKER == "gw0":
            assert portion() > 90
            meet("first")
        meet("both")
        assert 20 < portion() < 75
        meet("end")
"""


@linux_only
def test_the_pages_of_two_workers_are_the_same(runs: Runs) -> None:
    for place in ("first", "both", "end"):
        os.mkfifo(place)
    runs.run(SHARED, "-n2", "--dist=each").assert_outcomes(passed=2)


@pytest.mark.parametrize(
    ("body", "args"),
    [("assert False", ("-x",)), ("os.kill(os.getpid(), signal.SIGKILL)", ("--max-worker-restart=0",))],
    ids=["fails", "killed"],
)
def test_the_folder_goes_however_the_run_ends(runs: Runs, body: str, args: tuple[str, ...]) -> None:
    result = runs.run(f"{SCORES}    assert len(copies()) == 1\n    {body}\n", "-n2", "--dist=each", *args)
    assert result.ret == pytest.ExitCode.TESTS_FAILED or "-x" in args
    assert runs.told() != []
    assert runs.left() == []


DIES_ONCE = """
import os
from pathlib import Path

import pytest

@pytest.fixture(autouse=True)
def death_in_writing(monkeypatch):
    from pytest_sway.backends.hf.loading import shared_weights
    write = shared_weights.write_tensors

    def die_once(path, tensors):
        if not Path("died").exists():
            Path("died").touch()
            path.write_bytes(b"half of it")
            os._exit(1)
        write(path, tensors)

    monkeypatch.setattr(shared_weights, "write_tensors", die_once)
"""


def test_a_worker_that_dies_while_it_writes_harms_no_other(runs: Runs) -> None:
    runs.pytester.makeconftest(DIES_ONCE)
    result = runs.run(
        """
@pytest.mark.parametrize("n", range(4))
def test_scores(sway_backend, n):
    tell(score(sway_backend(SPEC)))
    assert len(copies()) == 1
""",
        "-n2",
    )
    result.assert_outcomes(failed=1, passed=3)
    assert len(set(runs.told())) == 1
    assert runs.left() == []


def test_a_full_disk_gives_a_warning_and_each_worker_keeps_its_own_copy(runs: Runs) -> None:
    runs.pytester.makeconftest(
        """
import shutil

def pytest_configure():
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda path: usage._replace(free=0)
"""
    )
    result = runs.run(SCORES, "-n2", "--dist=each")
    result.assert_outcomes(passed=2, warnings=2)
    result.stdout.fnmatch_lines(
        ["*SwayWarning: the weights of *base, converted to fp32, are not shared between workers: No space left*"]
    )
    assert len(set(runs.told())) == 1
    assert runs.left() == []


WAITS = """
def test_waits(sway_backend):
    score(sway_backend(SPEC))
    if WORKER == "gw0":
        meet("there")
        meet("go on")
"""


@pytest.fixture
def waiting(runs: Runs, start: Callable[..., subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """A run that has loaded its weights, and waits for the test."""
    for place in ("there", "go on"):
        os.mkfifo(place)
    runs.write(WAITS)
    child = start("-n2", "--dist=each")
    os.close(os.open("there", os.O_RDONLY))
    return child


def test_the_folder_goes_after_an_interrupt(runs: Runs, waiting: subprocess.Popen[str]) -> None:
    assert len(runs.left()) == 1
    os.killpg(waiting.pid, signal.SIGINT)
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == pytest.ExitCode.INTERRUPTED, output
    assert runs.left() == []


def test_two_runs_at_a_time_have_one_copy_each(runs: Runs, waiting: subprocess.Popen[str]) -> None:
    (folder,) = runs.left()
    second = runs.run(SCORES + "    assert len(copies()) == 2\n", "-n2", "--dist=each")
    second.assert_outcomes(passed=2)
    assert runs.left() == [folder]
    os.close(os.open("go on", os.O_RDONLY))
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, output
    assert runs.left() == []
