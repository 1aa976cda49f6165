"""How many bytes a backend takes: estimated from file headers before a load, measured after it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.adapter_files import read_adapter
from pytest_sway.backends.hf.base_files import base_file
from pytest_sway.backends.hf.gguf_files import gguf_file, read_gguf
from pytest_sway.backends.hf.headers import read_any
from pytest_sway.errors import SwayError
from pytest_sway.spec import base_key, base_spec, finetuned_spec, resolved_key

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.headers import TensorEntry
    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_ITEM_BYTES: Final = {"fp16": 2, "bf16": 2, "fp32": 4}
_FLOAT32_BYTES: Final = 4


def estimated(spec: ModelSpec) -> Mapping[Hashable, int] | None:
    """Return the bytes that each part of a resolved spec will take; ``None`` where that cannot be known."""
    tuned = finetuned_spec(spec)
    if tuned is not None:
        both = [estimated(base_spec(spec)), estimated(tuned)]
        return None if None in both else {key: size for parts in both for key, size in (parts or {}).items()}
    try:
        base_bytes = _base_bytes(spec)
        files = None if spec.adapter is None else read_adapter(spec.adapter, allow_pickle=spec.allow_pickle)
    except SwayError:
        return None
    if base_bytes is None:
        return None
    if files is None:
        return {base_key(spec): base_bytes}
    if files.entries is None:
        return None
    parts: dict[Hashable, int] = {("adapter", *resolved_key(spec)): _adapter_bytes(files)}
    if not files.shareable:
        parts["own base", *resolved_key(spec)] = base_bytes
    if files.shareable or not files.restorable:
        parts[base_key(spec)] = base_bytes
    return parts


def measured(tensors: Iterable[Any]) -> int:
    """Return the bytes of some tensors; what is in the same place counts once."""
    places: dict[tuple[Any, int], int] = {}
    for tensor in tensors:
        place = (tensor.device, tensor.data_ptr())
        places[place] = max(places.get(place, 0), tensor.nbytes)
    return sum(places.values())


def base_entries(spec: ModelSpec) -> Mapping[str, TensorEntry] | None:
    """Return the tensors of a base whose files are on this machine; ``None`` if it has no safetensors here.

    Raises:
        WeightsError: They are here, but broken.
    """
    for name in ("model.safetensors", "model.safetensors.index.json"):
        path = base_file(spec, name)
        if path is not None:
            return read_any(path.parent, "model")
    return None


def _base_bytes(spec: ModelSpec) -> int | None:
    item_bytes = _ITEM_BYTES[spec.dtype]
    gguf = gguf_file(spec)
    if gguf is not None:
        return read_gguf(gguf).numel * item_bytes  # what is in blocks is unpacked
    entries = base_entries(spec)
    if entries is None:
        return None
    tied = _ties_embeddings(spec)
    return sum(
        entry.numel * item_bytes if entry.floating else entry.nbytes
        for name, entry in entries.items()
        if not (tied and name == "lm_head.weight")
    )


def _ties_embeddings(spec: ModelSpec) -> bool:
    path = base_file(spec, "config.json")
    try:
        return path is not None and bool(json.loads(path.read_bytes()).get("tie_word_embeddings", False))
    except (OSError, ValueError, AttributeError):
        return False


def _adapter_bytes(files: AdapterFiles) -> int:
    """PEFT keeps the weights of adapters in float32."""
    assert files.entries is not None
    return sum(entry.numel * _FLOAT32_BYTES if entry.floating else entry.nbytes for entry in files.entries.values())
