"""Estimate from file headers how many bytes a backend will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.backends.checkpoints.peft_adapter import ROOT
from pytest_sway.backends.checkpoints.safetensors_header import read_any

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.checkpoints.plan import ModelFiles, Plan
    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_ITEM_BYTES: Final = {"fp16": 2, "bf16": 2, "fp32": 4}
_FLOAT32_BYTES: Final = 4
_TIED: Final = "lm_head.weight"  # a model with tied embeddings lacks it, though its file may have it


def estimated(plan: Plan) -> Mapping[Hashable, int] | None:
    """Return the bytes that each part of a plan with a PEFT adapter will take; ``None`` if unknown."""
    sizes, files = model_sizes(plan), plan.read
    if files is None or sizes is None:
        return sizes
    if files.entries is None:
        return None
    base, item_bytes = plan.models[-1], _ITEM_BYTES[plan.spec.dtype]
    own = _adapter_bytes(files, base.entries or {}, item_bytes)
    return {**sizes, ("adapter", *plan.key): own + (_model_bytes(base) or 0 if files.may_rewrite_anything else 0)}


def model_sizes(plan: Plan) -> dict[Hashable, int] | None:
    """Return the bytes that each model of a plan will take; ``None`` if unknown."""
    sizes: dict[Hashable, int] = {}
    for model in plan.models:
        nbytes = _merged_bytes(model) if model.merged else _model_bytes(model)
        if nbytes is None:
            return None
        sizes[model.key] = nbytes
    return sizes


def base_entries(spec: ModelSpec) -> Mapping[str, TensorEntry] | None:
    """Return the tensors of a base; ``None`` if its safetensors files are not on this machine.

    Raises:
        WeightsError: They are there, but broken.
    """
    for name in ("model.safetensors", "model.safetensors.index.json"):
        path = base_file(spec, name)
        if path is not None:
            return read_any(path.parent, "model")
    return None


def _model_bytes(model: ModelFiles) -> int | None:
    item_bytes = _ITEM_BYTES[model.spec.dtype]
    if model.gguf is not None:
        return model.gguf.numel * item_bytes  # packed blocks are unpacked
    if model.entries is None:
        return None
    tied = bool(model.config.get("tie_word_embeddings", False))
    return sum(_bytes_of(entry, item_bytes) for name, entry in model.entries.items() if not (tied and name == _TIED))


def _bytes_of(entry: TensorEntry, item_bytes: int) -> int:
    return entry.numel * item_bytes if entry.floating else entry.nbytes


def _merged_bytes(model: ModelFiles) -> int | None:
    """Return the bytes of what merging adapters changes in a model; ``None`` if unknown."""
    whole, item_bytes = _model_bytes(model), _ITEM_BYTES[model.spec.dtype]
    changed: dict[str, int] = {}
    for files in model.merged:
        if whole is None or files.entries is None:
            return None
        if files.may_rewrite_anything:
            return whole
        for name, entry in files.entries.items():
            weight = _changed_weight(name, model.entries or {})
            if weight is None:
                return whole
            before = _bytes_of((model.entries or {})[weight], item_bytes)
            own = entry.numel * item_bytes if name == ROOT + weight else 0
            changed[weight] = max(changed.get(weight, 0), before, own)
    return None if whole is None else min(whole, sum(changed.values()))


def _changed_weight(name: str, base: Mapping[str, TensorEntry]) -> str | None:
    """Return the base's weight that merging a tensor of an adapter changes; ``None`` if its name does not tell."""
    place = name.removeprefix(ROOT)
    if place in base:
        return place
    parts = place.split(".")
    found = (".".join((*parts[:end], "weight")) for end in range(len(parts) - 1, 0, -1))
    return next((weight for weight in found if weight in base), None)


def _adapter_bytes(files: AdapterFiles, base: Mapping[str, TensorEntry], item_bytes: int) -> int:
    """Return the bytes of an adapter itself.

    PEFT keeps an adapter's own weights in float32. Whole modules beside the base's, or written into it, have the base's
    dtype.

    Args:
        files: The adapter's files.
        base: The tensors of the base's files, by name.
        item_bytes: The bytes of one element of the base.
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
    """Whether PEFT also saved this tensor, or the base's own, under another name, as with resized embeddings."""
    parts = [part for part in name.split(".") if part not in ("modules_to_save", "original_module")]
    return ".".join(parts) != name and ".".join(parts) in (files.entries or ())


def _keeps_tied(files: AdapterFiles) -> bool:
    return bool(files.config.get("ensure_weight_tying"))
