"""Reads an adapter's tensors into one piece of memory, side by side as in their file.

Then reading, converting, cloning, watching and checking them each take one step instead of one per tensor. An adapter
for all linear layers of a large model has over a thousand tensors.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.system.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry

__tracebackhide__ = True

_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ALIGNMENT: Final = 64
"""Bytes. torch aligns tensors to this; kernels may sum in another order at other addresses."""


def read_packed(
    path: Path, entries: Mapping[str, TensorEntry], places: Mapping[str, Any], device: Any
) -> tuple[dict[str, Any], Any] | None:
    """Read the tensors of a safetensors file into one piece of memory.

    Args:
        path: The file.
        entries: Its tensors by name, in the file's order.
        places: Tensors with the wanted shapes and dtypes, by name.
        device: The ``torch.device`` to read to.

    Returns:
        Parameters by name, and the one-dimensional tensor that holds exactly them; ``None`` if dtypes are mixed, shapes
        differ from ``places``, or sizes leave tensors unaligned.
    """
    import torch

    stored, wanted = {entry.dtype for entry in entries.values()}, {place.dtype for place in places.values()}
    if len(stored) != 1 or len(wanted) != 1 or not stored <= _DTYPES.keys() or entries.keys() != places.keys():
        return None
    (dtype,), numels = wanted, [entry.numel for entry in entries.values()]
    if any(entry.shape != places[name].shape for name, entry in entries.items()):
        return None
    if any(numel * dtype.itemsize % _ALIGNMENT for numel, _ in pairwise(numels)):
        return None
    data = _data(path, sum(entry.nbytes for entry in entries.values()))
    if data is None:
        return None
    whole = data.view(getattr(torch, _DTYPES[stored.pop()])).to(device, dtype)
    pieces = zip(entries.items(), whole.split(numels), strict=True)
    return {
        name: torch.nn.Parameter(piece.view(entry.shape), requires_grad=False) for (name, entry), piece in pieces
    }, whole


def _data(path: Path, nbytes: int) -> Any | None:
    """Return the data behind a safetensors header as ``uint8``; ``None`` if it is not ``nbytes`` long."""
    import torch

    data = torch.empty(nbytes, dtype=torch.uint8)
    with open_regular(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(length, 1)
        complete = file.readinto(data.numpy().data) == nbytes and not file.read(1)
    return data if complete else None
