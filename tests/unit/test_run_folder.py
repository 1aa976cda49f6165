"""The folder of a run: there while the run is, gone afterwards, however the run ends."""

from __future__ import annotations

import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_sway.run_folder import RunFolder


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory, with nothing of others in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def other_run(directory: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start another process with a folder of its own."""
    children = []

    def start() -> subprocess.Popen[str]:
        source = (
            f"import sys, tempfile; tempfile.tempdir = {str(directory)!r}\n"
            "from pytest_sway.run_folder import RunFolder\n"
            "print(RunFolder().path, flush=True); sys.stdin.read()"
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


def test_two_runs_at_a_time_have_one_each(other_run: Callable[[], subprocess.Popen[str]]) -> None:
    theirs = _folder(other_run())
    mine = RunFolder()
    assert mine.path != theirs
    mine.remove()
    assert theirs.is_dir()


def test_what_a_killed_run_left_goes_with_the_next(other_run: Callable[[], subprocess.Popen[str]]) -> None:
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
