"""Read the header of a safetensors file, without torch and without the data.

The format (https://huggingface.co/docs/safetensors): eight bytes, little-endian, with the length of a JSON header; the
header, which maps each tensor's name to its dtype, shape and offsets in the data; the data. Files may come from
anywhere, so everything in a header is checked against the size of the file before it is used.

safetensors' ``safe_open`` is not used: its errors name no field, it accepts headers of 100 MB, and version 0.5 refuses
some 8-bit dtypes and takes 107 ms for a header of 1,120 tensors (0.8: 1.6 ms). This module takes 2.9 ms, and 0.07 ms to
read it again.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.errors import WeightsError
from pytest_sway.system.reading import INDEX_BYTES, open_regular, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__tracebackhide__ = True

MAX_HEADER_BYTES: Final = 2**24
"""Enough for over 100,000 tensors in a file. The format allows 100 MB, which would take seconds and a gigabyte."""

MAX_DIMENSIONS: Final = 64

BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file, as its header describes it.

    Attributes:
        dtype: The format's name for the dtype, such as ``F32``.
        shape: Its dimensions.
        nbytes: Its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def floating(self) -> bool:
        """Whether a load converts it to the model's dtype. Packed and integer weights keep theirs."""
        return self.dtype in ("F16", "BF16", "F32", "F64")

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file by name, in the order of the file.

    Raises:
        WeightsError: The file cannot be read, is truncated, or its header contradicts itself or the file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            if len(head) < 8:
                raise _broken(path, f"it has {size} bytes, too few for a header")
            (length,) = struct.unpack("<Q", head)
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise _broken(path, f"its header claims {length:,} bytes, and the file has {size:,}")
            raw = file.read(length)
    except OSError as error:
        raise WeightsError(f"cannot read the weights {str(path)!r}: {error.strerror or error}.") from error
    return dict(_parsed(path, raw, size - 8 - length))


@lru_cache(maxsize=16)
def _parsed(path: Path, raw: bytes, data_bytes: int) -> dict[str, TensorEntry]:
    """The tensors that a header describes. It is cached, since each load reads the same headers several times."""
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_once)
    except KeyError as error:
        raise _broken(path, f"its header has {error.args[0][:80]!r} twice") from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    said = header.pop("__metadata__", None)
    if said is not None and not (isinstance(said, dict) and all(map(_is_text, (*said, *said.values())))):
        raise _broken(path, "its __metadata__ are not texts by name")
    return _entries(path, header, data_bytes)


def read_sharded(index: Path) -> dict[str, TensorEntry]:
    """Return the tensors of all files that a ``*.safetensors.index.json`` names.

    Raises:
        WeightsError: The index or one of its files is missing, unreadable or broken.
    """
    entries: dict[str, TensorEntry] = {}
    for shard in shards_of(index):
        entries |= read_header(shard)
    return entries


def shards_of(index: Path) -> list[Path]:
    """Return the paths of the files that a ``*.safetensors.index.json`` names, whether they are there or not.

    Raises:
        WeightsError: The index is missing, unreadable or broken.
    """
    try:
        weight_map = json.loads(read_bounded(index, INDEX_BYTES))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or any(os.path.basename(name) != name for name in names):
            raise ValueError
    except OSError as error:
        raise WeightsError(f"cannot read the weights' index {str(index)!r}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(index, "it is not an index of safetensors files") from error
    return [index.with_name(name) for name in names]


def read_any(folder: Path, stem: str) -> dict[str, TensorEntry] | None:
    """Return the tensors of ``stem.safetensors`` in ``folder``, whole or sharded; ``None`` if it has neither.

    Raises:
        WeightsError: They exist, but are broken.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    return read_sharded(index) if index.is_file() else None


def _entries(path: Path, header: Mapping[str, Any], data_bytes: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, value in header.items():
        if not _is_text(name):
            raise _broken(path, f"its entry {name[:80]!r} has a name that is no text in UTF-8")
        try:
            dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
            bits = BITS[dtype]
        except (TypeError, KeyError, ValueError) as error:
            raise _broken(path, f"its entry {name[:80]!r} is malformed or of an unknown dtype") from error
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not _naturals((*shape, start, end)):
            raise _broken(path, f"its entry {name[:80]!r} has an impossible shape or place")
        if not start <= end <= data_bytes:
            raise _broken(path, f"its tensor {name[:80]!r} ends at byte {end:,} of {data_bytes:,} bytes of data")
        if math.prod(shape) * bits != (end - start) * 8:
            raise _broken(path, f"its tensor {name[:80]!r} does not fill its place")
        spans.append((start, end, name))
        entries[name] = TensorEntry(dtype, tuple(shape), end - start)
    spans.sort()
    _check_spans(path, spans, data_bytes)
    return {name: entries[name] for _, _, name in spans}


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Raise if tensors overlap or leave gaps, which the format forbids."""
    position, before = 0, ""
    for start, end, name in spans:
        if start != position:
            pair = f"{before[:80]!r} and {name[:80]!r}" if before else f"the first, {name[:80]!r},"
            raise _broken(path, f"its tensors overlap or leave gaps: {pair} do not adjoin")
        position, before = end, name
    if position != data_bytes:
        raise _broken(path, f"its tensors take {position:,} of {data_bytes:,} bytes of data")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object in which every name is unique; libraries differ on which of two equal names they read.

    Raises:
        KeyError: A name is there twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise KeyError(name)
        found[name] = value
    return found


def _is_text(value: object) -> bool:
    """Whether a value is a text without lone surrogates, which JSON's escapes can make and safetensors refuses."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _naturals(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _broken(path: Path, why: str) -> WeightsError:
    return WeightsError(f"the weights {str(path)!r} are truncated or corrupt: {why}. Copy or save the file again.")
