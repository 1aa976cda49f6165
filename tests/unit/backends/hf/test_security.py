"""Untrusted files: their code does not run, and they cannot use up time or memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import SpecError, SwayError, WeightsError
from pytest_sway.spec.parsing import parse_spec
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pytest_sway.backends.hf.builder import HFBuilder


class _Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def malicious(adapter: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter whose weights contain code, and the folder that the code would create."""
    folder, mark = shutil.copytree(adapter, tmp_path / "malicious"), tmp_path / "the code ran"
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Exploit(mark)))
    return folder, mark


def test_the_exploit_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Exploit(tmp_path / "the code ran")))
    assert (tmp_path / "the code ran").is_dir()


def test_a_pickled_adapter_that_would_run_code_is_refused_and_the_code_does_not_run(
    builder: HFBuilder, base: Path, malicious: tuple[Path, Path]
) -> None:
    folder, mark = malicious
    with pytest.raises(WeightsError, match="allow_pickle=True"):
        builder(spec_of(base, folder))
    assert not mark.exists()


def test_leave_to_read_pickles_is_leave_to_read_tensors_not_to_run_code(
    builder: HFBuilder, base: Path, malicious: tuple[Path, Path]
) -> None:
    folder, mark = malicious
    with pytest.raises(Exception, match=r"(?i)weights|unpickl"):
        builder(spec_of(base, folder, allow_pickle=True))
    assert not mark.exists()


def _header(length: int, body: bytes) -> bytes:
    return struct.pack("<Q", length) + body


ABSURD = {
    "a header of 2**62 bytes": _header(2**62, b"{}"),
    "100 MB of JSON": _header(100_000_000, b'{"a":"' + b"x" * 99_999_992 + b'"}'),
    "16 MB of brackets": _header(2**24, b"[" * 2**24),
    "offsets beyond 2**63": _header(66, b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,9223372036854775808]}}'),
    "overlapping tensors": _header(
        len(body := json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}).encode()),
        body + bytes(4),
    ),
    "a dtype that nobody knows": _header(
        len(body := json.dumps({"x": {"dtype": "F13", "shape": [1], "data_offsets": [0, 4]}}).encode()), body + bytes(4)
    ),
}


@pytest.mark.parametrize("absurdity", ABSURD)
def test_an_absurd_header_is_an_error_at_once_and_takes_no_memory(
    builder: HFBuilder, base: Path, adapter: Path, tmp_path: Path, absurdity: str
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "absurd")
    (folder / "adapter_model.safetensors").write_bytes(ABSURD[absurdity])
    spec = spec_of(base, folder)
    builder.check(spec_of(base, adapter))  # so that imports are not measured
    tracemalloc.start()
    started = time.thread_time()
    try:
        with pytest.raises(WeightsError, match="truncated or corrupt"):
            builder.check(spec)
        seconds = time.thread_time() - started
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
    assert seconds < 1  # CPU time of this thread


@pytest.mark.parametrize("form", ["with spaces and ünïcode", "a link", "dots"])
def test_unusual_paths_work(build: Any, base: Path, adapter: Path, tmp_path: Path, form: str) -> None:
    path = {
        "with spaces and ünïcode": tmp_path / "my adapter, ünïcode",
        "a link": tmp_path / "link",
        "dots": tmp_path / "x" / ".." / "copy",
    }[form]
    if form == "a link":
        path.symlink_to(adapter)
    else:
        (tmp_path / "x").mkdir()
        shutil.copytree(adapter, path)
    with build(base, path).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, adapter)))


def test_a_link_to_itself_is_refused_with_a_reason(builder: HFBuilder, base: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SpecError, match=r"loop"):  # raised while parsing, or on later Pythons when it is not found
        builder.check(parse_spec({"base": base, "adapter": tmp_path / "loop"}))


def test_a_null_byte_in_a_path_is_refused_with_a_reason() -> None:
    with pytest.raises(SwayError, match="cannot be resolved"):
        parse_spec({"base": "org/name", "adapter": "runs/\0v3"})
