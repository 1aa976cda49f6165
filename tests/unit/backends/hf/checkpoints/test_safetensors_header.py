from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.checkpoints.safetensors_header import read_any, read_header
from pytest_sway.errors import WeightsError

if TYPE_CHECKING:
    from pathlib import Path


def _write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def _entry(start: int, end: int, *, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def test_what_safetensors_writes_is_read_back(base: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(base / "model.safetensors")
    entries = read_header(base / "model.safetensors")
    assert {name: (tuple(t.shape), t.nbytes) for name, t in tensors.items()} == {
        name: (entry.shape, entry.nbytes) for name, entry in entries.items()
    }


def test_the_shards_of_an_index_are_read_together(tmp_path: Path) -> None:
    _write(tmp_path / "a.safetensors", {"x": _entry(0, 8)}, bytes(8))
    _write(tmp_path / "b.safetensors", {"y": _entry(0, 4)}, bytes(4))
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {name: entry.nbytes for name, entry in (read_any(tmp_path, "model") or {}).items()} == {"x": 8, "y": 4}


def test_a_folder_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_any(tmp_path, "model") is None


@pytest.mark.parametrize(
    ("header", "data", "length", "why"),
    [
        pytest.param({}, b"", 2**62, "claims 4,611,686,018,427,387,904 bytes", id="absurd length"),
        pytest.param({}, b"", 3, "claims 3 bytes", id="header past the end"),
        pytest.param(b"{not json", b"", None, "not JSON", id="not JSON"),
        pytest.param(b"[" * 100_000, b"", None, "not JSON", id="nested beyond reason"),
        pytest.param("{}".encode("utf-16-le"), b"", None, "not JSON", id="not UTF-8"),
        pytest.param([], b"", None, "not a JSON object", id="not an object"),
        pytest.param({"\ud800": _entry(0, 4)}, bytes(4), None, "no text in UTF-8", id="half a character as a name"),
        pytest.param({"__metadata__": {"x": "\ud800"}}, b"", None, "not texts", id="half a character as metadata"),
        pytest.param({"x": 1}, b"", None, "malformed", id="entry is no object"),
        pytest.param({"x": {"dtype": "F32"}}, b"", None, "malformed", id="entry lacks fields"),
        pytest.param({"x": _entry(0, 4, dtype="Q9")}, bytes(4), None, "unknown dtype", id="unknown dtype"),
        pytest.param({"x": _entry(0, 4, dtype=["F32"])}, bytes(4), None, "malformed", id="dtype is no string"),
        pytest.param({"x": _entry(0, 4, shape=[-1])}, bytes(4), None, "impossible shape", id="negative dimension"),
        pytest.param({"x": _entry(0, 4, shape=[1.0])}, bytes(4), None, "impossible shape", id="fractional dimension"),
        pytest.param({"x": _entry(0, 4, shape="1")}, bytes(4), None, "impossible shape", id="shape is no list"),
        pytest.param({"x": _entry(0, 4, shape=[2**62] * 65)}, bytes(4), None, "impossible shape", id="65 dimensions"),
        pytest.param({"x": _entry(0, 4, shape=[2])}, bytes(4), None, "does not fill", id="shape and place differ"),
        pytest.param({"x": _entry(0, 400)}, bytes(4), None, "ends at byte 400 of 4", id="place past the end"),
        pytest.param({"x": _entry(4, 0, shape=[0])}, bytes(4), None, "ends at byte 0", id="ends before it starts"),
        pytest.param(
            {"x": _entry(0, 4), "y": _entry(0, 4)}, bytes(4), None, "overlap or leave gaps: 'x' and 'y'", id="overlap"
        ),
        pytest.param({"x": _entry(4, 8)}, bytes(8), None, "leave gaps: the first, 'x',", id="gap"),
        pytest.param(b'{"x": {}, "y": {}, "x": {}}', b"", None, "its header has 'x' twice", id="a tensor twice"),
        pytest.param({"x": _entry(0, 4)}, bytes(8), None, "take 4 of 8 bytes", id="data without tensor"),
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, header: Any, data: bytes, length: int | None, why: str) -> None:
    path = _write(tmp_path / "x.safetensors", header, data, length=length)
    with pytest.raises(WeightsError, match="truncated or corrupt") as caught:
        read_header(path)
    assert why in str(caught.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(WeightsError, match="0 bytes, too few"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {"x": "../../etc/passwd"}}', '{"weight_map": {"x": 1}}', "{"]
)
def test_a_broken_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match="not an index"):
        read_any(tmp_path, "model")
