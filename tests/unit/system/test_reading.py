"""Untrusted files: only regular files are read, up to a bound, without blocking."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_sway.errors import SpecError
from pytest_sway.spec.answers import read_answers
from pytest_sway.spec.identity import resolved_key
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.reading import read_bounded

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")


def test_a_file_up_to_the_bound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes, too many for a file of its kind") as caught:
        read_bounded(path, 4)
    assert caught.value.filename == str(path)


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    assert read_bounded(tmp_path / "link", 5) == b"1"


@needs_pipes
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with pytest.raises(OSError, match=f"it is a {kind}, not a regular file"):
        read_bounded(tmp_path / kind, 5)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"it is a folder, not a regular file|Is a directory|Permission denied"):
        read_bounded(tmp_path, 5)


@needs_pipes
def test_answers_in_a_pipe_are_refused_and_have_a_key(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "answers.json")
    spec = ModelSpec(kind="dummy", base="a", answers=tmp_path / "answers.json", device="cpu", dtype="fp32")
    assert resolved_key(spec) == resolved_key(spec)
    with pytest.raises(SpecError, match=r"answers.json' cannot be read: .*it is a pipe, not a regular file"):
        read_answers(tmp_path / "answers.json")
