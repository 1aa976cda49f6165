"""Reads weights that exist only as a pickle. It reads tensors only, and runs no code from the pickle."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.backends.checkpoints.peft_adapter import PICKLED, checked, peft_names, with_peft_names
from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry
from pytest_sway.errors import WeightsError
from pytest_sway.system.reading import INDEX_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_OF_BASE: Final = "pytorch_model.bin"


def with_entries(files: AdapterFiles) -> AdapterFiles:
    """Return an adapter's files with the names and shapes of its tensors, read from its pickle if need be.

    Raises:
        WeightsError: The pickle cannot be read, or holds objects other than tensors.
    """
    if files.entries is not None:
        return files
    import torch

    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    entries = {
        name: TensorEntry(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), tensor.nbytes)
        for name, tensor in read_pickle(files, "meta").items()
    }
    _, parts = peft_names(entries)
    return checked(replace(files, entries=with_peft_names(entries), taken_out=tuple(parts)))


def read_pickle(files: AdapterFiles, device: str) -> dict[str, Any]:
    """Read the tensors of an adapter's pickle by name.

    Raises:
        WeightsError: The pickle cannot be read, or holds objects other than tensors.
    """
    import torch

    path = files.folder / PICKLED
    tensors = _read(path, device, "adapter")
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise _no_tensors(path, "adapter")
    return tensors


def names_in_base(spec: ModelSpec) -> Collection[str] | None:
    """Return the names of the weights in a base's pickle; ``None`` if it has none on this machine.

    Raises:
        WeightsError: The pickle, or the index of several, cannot be read.
    """
    path, index = base_file(spec, _OF_BASE), base_file(spec, f"{_OF_BASE}.index.json")
    if path is not None:
        state = path.stat()
        return _names_in(path, state.st_size, state.st_mtime_ns)
    if index is None:
        return None
    try:
        return frozenset(json.loads(read_bounded(index, INDEX_BYTES))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{str(index)!r} is not an index of weights. Copy or save the model again.") from error


@lru_cache(maxsize=16)
def _names_in(path: Path, _size: int, _written: int) -> frozenset[str]:
    """The names in a pickle. It is cached, since each load asks for them several times."""
    return frozenset(_read(path, "meta", "model"))


def _read(path: Path, device: str, what: str) -> dict[str, Any]:
    import pickle

    import torch

    try:
        mapped = device == "meta" and zipfile.is_zipfile(path)  # then the values are not read at all
        tensors = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise WeightsError(
            f"{str(path)!r} cannot be read as tensors: {why}. Save the {what} as safetensors."
        ) from error
    if not isinstance(tensors, dict):
        raise _no_tensors(path, what)
    return tensors


def _no_tensors(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{str(path)!r} is not a dictionary of tensors. Save the {what} as safetensors.")
