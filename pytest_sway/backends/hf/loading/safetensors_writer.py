"""Writing tensors to a safetensors file in which each begins where torch would have put it.

The library's own ``save_file`` puts none of the 272 tensors of SmolLM2-135M at a multiple of 64 bytes, and products of
matrices can round otherwise elsewhere. Its errors don't tell a full disk, and before its version 0.8 it first copies
every tensor into ``bytes``.
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
"""Bytes at whose multiples torch's own tensors begin; a product of matrices can round otherwise at other places."""

_DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors of the CPU to a new file; each begins at a multiple of `ALIGNMENT`, as far as sizes allow.

    Raises:
        OSError: There is no room, or the file cannot be written.
        TypeError: A tensor has a dtype that is not written here.
    """
    # The format leaves no gaps, so what would put others out of their places goes last.
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
        raise TypeError(f"{name} is of dtype {dtype}")
    return _DTYPES[dtype]


def raw_bytes(tensor: Any) -> Any:
    """Return the content of a tensor of the CPU as a flat one of ``uint8``, without a copy if it is contiguous."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
