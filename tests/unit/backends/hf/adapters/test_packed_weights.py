"""An adapter's tensors in one piece of memory equal those of its file, and do not overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from pytest_sway.backends.checkpoints.safetensors_header import read_header  # noqa: E402
from pytest_sway.backends.hf.adapters.packed_weights import read_packed  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path


def _read(path: Path, places: dict[str, Any]) -> Any:
    return read_packed(path, read_header(path), places, torch.device("cpu"))


def _tensors(dtype: Any = torch.float32) -> dict[str, Any]:
    return {name: torch.randn(4, 16).to(dtype) for name in ("b", "a", "c")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_they_are_those_of_the_file_in_the_dtype_of_their_places(tmp_path: Path, dtype: Any) -> None:
    tensors = _tensors(dtype)
    save_file(tensors, path := tmp_path / "t.safetensors")
    parameters, whole = _read(path, {name: torch.empty(4, 16, device="meta") for name in tensors})
    assert all(torch.equal(parameters[name], tensor.float()) for name, tensor in tensors.items())
    assert {parameter.untyped_storage()._cdata for parameter in parameters.values()} == {whole.untyped_storage()._cdata}
    assert whole.numel() == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("tensors", "places"),
    [
        ({"a": torch.ones(3), "b": torch.ones(16)}, {"a": torch.empty(3), "b": torch.empty(16)}),
        ({"a": torch.ones(16), "b": torch.ones(16).half()}, {"a": torch.empty(16), "b": torch.empty(16)}),
        ({"a": torch.ones(16)}, {"a": torch.empty(16), "b": torch.empty(16)}),
        ({"a": torch.ones(16)}, {"a": torch.empty(4, 4)}),
        ({"a": torch.ones(16).to(torch.int8)}, {"a": torch.empty(16)}),
    ],
    ids=["unaligned", "of two dtypes", "one is missing", "of another shape", "no floats"],
)
def test_what_cannot_lie_so_is_left_to_be_read_one_by_one(
    tmp_path: Path, tensors: dict[str, Any], places: dict[str, Any]
) -> None:
    save_file(tensors, path := tmp_path / "t.safetensors")
    assert _read(path, places) is None


def test_a_file_that_was_cut_off_since_its_header_was_read_is_none(tmp_path: Path) -> None:
    save_file(tensors := _tensors(), path := tmp_path / "t.safetensors")
    entries = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    assert read_packed(path, entries, dict(tensors), torch.device("cpu")) is None
