"""The user's cache folder, and small files in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_sway.backends.local.user_cache import read_small, user_cache, write_small


def test_the_folder_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "pytest-sway"


def test_tests_have_another_than_the_user(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from pytest_sway.backends.hf.model import trial_files

    assert vars(trial_files)["user_cache"]() == own_cache
    assert own_cache.is_relative_to(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("platform", "folder"), [("linux", ".cache"), ("darwin", "Library/Caches")], ids=["Linux", "macOS"]
)
def test_without_a_setting_it_is_where_the_system_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, folder: str
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert user_cache() == tmp_path / folder / "pytest-sway"


def test_a_user_without_a_home_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert user_cache() is None


def test_what_is_written_is_read_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "file"
    for content in (b"one", b"two"):
        write_small(file, content, most=9)
        assert read_small(file, 9) == content
    assert [each.name for each in file.parent.iterdir()] == ["file"]


def test_a_file_that_is_missing_too_large_or_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"0123456789")
    (tmp_path / "folder").mkdir()
    assert [read_small(tmp_path / name, 9) for name in ("missing", "large", "folder")] == [None] * 3


def test_the_last_used_files_stay(tmp_path: Path) -> None:
    for n in range(5):
        write_small(tmp_path / str(n), b"", most=5)
        os.utime(tmp_path / str(n), (n, n))
    read_small(tmp_path / "0", 9)
    write_small(tmp_path / "new", b"", most=3)
    assert {file.name for file in tmp_path.iterdir()} == {"0", "4", "new"}


def test_a_folder_that_cannot_be_made_or_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_small(tmp_path / "file" / "inside", b"", most=9)
    (tmp_path / "there").mkdir()
    write_small(tmp_path / "there", b"", most=9)  # the name is a folder's
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "there"]
