"""How many bytes a backend will take, by the headers of its files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from pytest_sway.backends.checkpoints.gguf_header import gguf_file, read_gguf
from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.backends.checkpoints.peft_adapter import ROOT, read_adapter
from pytest_sway.backends.checkpoints.safetensors_header import read_any
from pytest_sway.errors import SwayError
from pytest_sway.spec.identity import base_key, base_spec, finetuned_spec, resolved_key
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.checkpoints.plan import Plan
    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_ITEM_BYTES: Final = {"fp16": 2, "bf16": 2, "fp32": 4}
_FLOAT32_BYTES: Final = 4
_TIED: Final = "lm_head.weight"  # which a model with tied embeddings does not have, if a file of it may


def estimated(spec: ModelSpec, plan: Plan | None = None) -> Mapping[Hashable, int] | None:
    """Return the bytes that each part of a resolved spec will take; ``None`` where that cannot be known.

    Args:
        spec: The spec.
        plan: What its files say, if that was read already.
    """
    tuned = finetuned_spec(spec)
    if tuned is not None:
        both = [estimated(base_spec(spec)), estimated(tuned)]
        return None if None in both else {key: size for parts in both for key, size in (parts or {}).items()}
    try:
        entries = base_entries(spec) if plan is None else plan.entries
        base_bytes = _base_bytes(spec, entries)
        if plan is not None:
            files = plan.files
        else:
            files = None if spec.adapter is None else read_adapter(spec.adapter, allow_pickle=spec.allow_pickle)
    except SwayError:
        return None
    if base_bytes is None:
        return None
    if files is None:
        return {base_key(spec): base_bytes}
    if files.entries is None:
        return None
    own = _adapter_bytes(files, entries or {}, _ITEM_BYTES[spec.dtype]) + (
        base_bytes if files.may_rewrite_anything else 0
    )
    return {base_key(spec): base_bytes, ("adapter", *resolved_key(spec)): own}


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


def _base_bytes(spec: ModelSpec, entries: Mapping[str, TensorEntry] | None) -> int | None:
    item_bytes = _ITEM_BYTES[spec.dtype]
    gguf = gguf_file(spec)
    if gguf is not None:
        return read_gguf(gguf).numel * item_bytes  # what is in blocks is unpacked
    if entries is None:
        return None
    tied = _ties_embeddings(spec)
    return sum(
        entry.numel * item_bytes if entry.floating else entry.nbytes
        for name, entry in entries.items()
        if not (tied and name == _TIED)
    )


def _ties_embeddings(spec: ModelSpec) -> bool:
    path = base_file(spec, "config.json")
    try:
        return path is not None and bool(json.loads(read_bounded(path, CONFIG_BYTES)).get("tie_word_embeddings", False))
    except (OSError, ValueError, AttributeError):
        return False


def _adapter_bytes(files: AdapterFiles, base: Mapping[str, TensorEntry], item_bytes: int) -> int:
    """Return what an adapter takes for itself.

    PEFT keeps an adapter's own weights in float32. Whole modules, which stand beside the base's or are written into it,
    are in the base's dtype.

    Args:
        files: The adapter.
        base: The tensors of the base's files, by name.
        item_bytes: The size of an element of the base.
    """
    assert files.entries is not None
    saved = tuple(f".{module}." for module in files.config.get("modules_to_save") or ())
    own = 0
    for name, entry in files.entries.items():
        place = name.removeprefix(ROOT).replace(".token_adapter.", ".").replace(".base_layer.", ".")
        before = base.get(place)
        whole = any(module in f".{place}" for module in saved)
        if _saved_again(name, files) or (before is None and place == _TIED and (not whole or _keeps_tied(files))):
            continue
        if not entry.floating:
            own += entry.nbytes
        else:
            own += entry.numel * (item_bytes if whole or before is not None else _FLOAT32_BYTES)
        if whole and before is not None and before.shape != entry.shape:
            own += entry.numel * item_bytes  # the base's own module is resized, too
        target, marker, _ = place.partition(".lora_A.")
        if marker and files.rewrites_targets and f"{target}.weight" in base:
            own += base[f"{target}.weight"].numel * item_bytes
    return own


def _saved_again(name: str, files: AdapterFiles) -> bool:
    """Whether PEFT saved a tensor, or the base's own, under this name besides another, as with resized embeddings."""
    parts = [part for part in name.split(".") if part not in ("modules_to_save", "original_module")]
    return ".".join(parts) != name and ".".join(parts) in (files.entries or ())


def _keeps_tied(files: AdapterFiles) -> bool:
    return bool(files.config.get("ensure_weight_tying"))
