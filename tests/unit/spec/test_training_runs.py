"""The checkpoints of a training run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_sway import SwayError, checkpoints


def test_they_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("checkpoint-900", "checkpoint-1000", "checkpoint-90", "checkpoint-best", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-90", "checkpoint-900", "checkpoint-1000"]


def test_a_relative_folder_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/checkpoint-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert checkpoints("run") == [tmp_path / "run/checkpoint-1"]


def test_a_run_without_any_is_an_error_since_pytest_would_skip_the_test(tmp_path: Path) -> None:
    with pytest.raises(SwayError, match=r"has no checkpoints: no folder in it is named checkpoint-<step>\.$"):
        checkpoints(tmp_path)


def test_a_folder_that_is_not_there_is_named_as_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(SwayError, match=r"^the run 'runs/gone' is not a folder: "):
        checkpoints("runs/gone")
