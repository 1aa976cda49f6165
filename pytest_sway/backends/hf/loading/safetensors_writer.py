"""Writes safetensors files in which each tensor is aligned as torch aligns it in memory.

The library's ``save_file`` puts none of the 272 tensors of SmolLM2-135M at a multiple of 64 bytes, and matrix products
can round differently at other addresses. Its errors do not report a full disk. Before version 0.8, it copies every
tensor into ``bytes`` first.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__tracebackhide__ = True

ALIGNMENT: Final = 64
"""Bytes. torch allocates tensors at multiples of this; matrix products can round differently at other addresses."""

_DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write CPU tensors to a new file, each at a multiple of `ALIGNMENT` bytes as far as sizes allow.

    Raises:
        OSError: The disk is full, or the file cannot be written.
        TypeError: A tensor's dtype is not supported.
    """
    # The format allows no gaps, so tensors that would misalign those after them come last.
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT, -item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head = head.ljust(math.ceil((8 + len(head)) / ALIGNMENT) * ALIGNMENT - 8)
    if shutil.disk_usage(path.parent).free < 8 + len(head) + end:  # others need the disk too: don't fill it first
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, tensor in ordered:
            file.write(memoryview(raw_bytes(tensor).numpy()))


def _dtype(name: str, tensor: Any) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {dtype}, which the safetensors writer does not support")
    return _DTYPES[dtype]


def raw_bytes(tensor: Any) -> Any:
    """Return the contents of a CPU tensor as a flat ``uint8`` tensor, without a copy if it is contiguous."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
