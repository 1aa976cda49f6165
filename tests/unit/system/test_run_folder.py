"""The folder of a run exists during the run and is removed afterwards, even after signals."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_sway.system.run_folder import RunFolder


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """Start child processes with default handlers, since nohup ignores SIGHUP."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty temporary directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other_run(directory: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start another process with a folder of its own."""
    children = []

    def start(before: str = "", after: str = "") -> subprocess.Popen[str]:
        source = (
            f"import sys, tempfile; tempfile.tempdir = {str(directory)!r}\n"
            "from pytest_sway.system.run_folder import RunFolder\n"
            f"{before}\nfolder = RunFolder()\n{after}\nprint(folder.path, flush=True); sys.stdin.read()"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def _folder(child: subprocess.Popen[str]) -> Path:
    assert child.stdout is not None
    return Path(child.stdout.readline().strip())


def test_only_this_user_can_look_into_it(directory: Path) -> None:
    folder = RunFolder()
    assert folder.path.parent == directory
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.remove()


def test_it_goes_with_all_that_is_in_it(directory: Path) -> None:
    folder = RunFolder()
    (folder.path / "a" / "b").mkdir(parents=True)
    (folder.path / "a" / "b" / "c").touch()
    folder.remove()
    assert list(directory.iterdir()) == []


def test_two_runs_at_a_time_have_one_each(other_run: Callable[..., subprocess.Popen[str]]) -> None:
    theirs = _folder(other_run())
    mine = RunFolder()
    assert mine.path != theirs
    mine.remove()
    assert theirs.is_dir()


def test_what_a_killed_run_left_goes_with_the_next(other_run: Callable[..., subprocess.Popen[str]]) -> None:
    child = other_run()
    left = _folder(child)
    (left / "weights").touch()
    child.kill()
    child.wait()
    assert left.is_dir()
    RunFolder().remove()
    assert not left.exists()


def test_folders_of_others_are_let_alone(directory: Path) -> None:
    (directory / "pytest-sway-notes").mkdir()
    (directory / "pytest-sway-notes" / "keep").touch()
    (directory / "pytest-sway-file").touch()
    (directory / "elsewhere").mkdir()
    (directory / "elsewhere" / "alive").touch()
    (directory / "pytest-sway-link").symlink_to(directory / "elsewhere")
    before = sorted(directory.rglob("*"))
    RunFolder().remove()
    assert sorted(directory.rglob("*")) == before


DEADLY = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


@pytest.mark.parametrize("number", DEADLY)
def test_a_signal_that_ends_the_run_removes_it(other_run: Callable[..., subprocess.Popen[str]], number: int) -> None:
    child = other_run()
    left = _folder(child)
    (left / "weights").touch()
    child.send_signal(number)
    assert child.wait(60) == -number
    assert list(left.parent.glob("pytest-sway-*")) == []


# os.write, since the signal may come while the child is still inside its own print.
OWN = "import os, signal\ndef own(*_):\n    os.write(1, b'own handler\\n')\n    sys.exit(3)\n"


@pytest.mark.parametrize("number", DEADLY)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_of_the_users_own_stays(
    other_run: Callable[..., subprocess.Popen[str]], number: int, when: str
) -> None:
    child = other_run(**{when: f"{OWN}signal.signal({number}, own)"})
    _folder(child)
    child.send_signal(number)
    assert child.wait(60) == 3
    assert child.stdout is not None
    assert child.stdout.read() == "own handler\n"


def test_a_handler_that_calls_the_one_before_it_removes_the_folder(
    other_run: Callable[..., subprocess.Popen[str]],
) -> None:
    after = (
        "import os, signal\nprevious = signal.getsignal(15)\n"
        "def own(*args):\n    os.write(1, b'own handler\\n')\n    previous(*args)\nsignal.signal(15, own)"
    )
    child = other_run(after=after)
    left = _folder(child)
    child.send_signal(15)
    assert child.wait(60) == -15
    assert not left.exists()


def test_an_ignored_signal_stays_ignored(directory: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        folder = RunFolder()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        folder.remove()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_afterwards_signals_are_what_they_were(directory: Path) -> None:
    before = [signal.getsignal(number) for number in DEADLY]
    RunFolder().remove()
    assert [signal.getsignal(number) for number in DEADLY] == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_the_end_of_a_forked_child_leaves_the_folder_to_its_parent(
    other_run: Callable[..., subprocess.Popen[str]],
) -> None:
    after = "import os\nif not (child := os.fork()): os.kill(os.getpid(), 15)\nassert os.waitpid(child, 0)[1] == 15"
    assert _folder(other_run(after=after)).is_dir()
