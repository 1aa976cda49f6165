"""Estimate from file headers how many bytes a backend will take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.hub_files import INDEX, SINGLE, base_file, missing_shard
from pytest_sway.backends.checkpoints.peft_adapter import ROOT
from pytest_sway.backends.checkpoints.safetensors_header import read_any
from pytest_sway.errors import WeightsError
from pytest_sway.spec.model_kwargs import as_mapping, method_of, named_type, unpacks

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

_BLOCK: Final = 64
"""Weights that share a scale in bitsandbytes' 4-bit formats."""

_NESTED_BLOCK: Final = 256
"""Scales that share a scale of their own, if they are quantized, too."""

_CODE: Final = 16 * 4
_NESTED_CODE: Final = 256 * 4 + 4
"""Bytes of the numbers that a weight's 4 bits stand for, and a quantized scale's 8."""

_TORCHAO_BYTES: Final = {"Int8WeightOnlyConfig": 1.0, "Float8WeightOnlyConfig": 1.0}


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
    """Return the tensors of a base; ``None`` if its safetensors files are not, or not all, on this machine.

    Raises:
        WeightsError: They are there, but broken; or a folder lacks a file that its index names.
    """
    path = base_file(spec, SINGLE) or base_file(spec, INDEX)
    if path is None:
        return None
    try:
        return read_any(path.parent, "model")
    except WeightsError:
        if missing_shard(spec) is None:
            raise
        return None


def _model_bytes(model: ModelFiles) -> int | None:
    item_bytes = _ITEM_BYTES[model.spec.dtype]
    if model.gguf is not None:
        return model.gguf.numel * item_bytes  # packed blocks are unpacked
    if model.entries is None:
        return None
    tied = bool(model.config.get("tie_word_embeddings", False))
    sizes = _weight_sizes(model, item_bytes)
    if sizes is None:
        return None
    return sum(nbytes for name, nbytes in sizes.items() if not (tied and name == _TIED))


def _weight_sizes(model: ModelFiles, item_bytes: int) -> dict[str, int] | None:
    """Return the bytes of each loaded weight by its name in the files, which are known; ``None`` if a size is not."""
    quantized = _quantized_on_load(model, item_bytes)
    if quantized is None:
        return None
    as_stored = {name: _bytes_of(entry, item_bytes) for name, entry in (model.entries or {}).items()}
    return {**as_stored, **_scales(model), **quantized, **_unpacked(model, item_bytes)}


def _bytes_of(entry: TensorEntry, item_bytes: int) -> int:
    return entry.numel * item_bytes if entry.floating else entry.nbytes


def _scales(model: ModelFiles) -> dict[str, int]:
    """Return the bytes of each scale of a model's files by GPTQ or AWQ, which keep their dtype, by its name."""
    stored = model.config.get("quantization_config")
    keeps = isinstance(stored, dict) and method_of(stored) in ("gptq", "awq")
    return {name: each.nbytes for name, each in (model.entries or {}).items() if keeps and name.endswith(".scales")}


def _merged_bytes(model: ModelFiles) -> int | None:
    """Return the bytes of what merging adapters changes in a model; ``None`` if unknown."""
    whole, item_bytes = _model_bytes(model), _ITEM_BYTES[model.spec.dtype]
    sizes = _weight_sizes(model, item_bytes) or {}
    changed: dict[str, int] = {}
    for files in model.merged:
        if whole is None or files.entries is None:
            return None
        if files.may_rewrite_anything:
            return whole
        for name, entry in files.entries.items():
            weight = _changed_weight(name, sizes)
            if weight is None:
                return whole
            own = entry.numel * item_bytes if name == ROOT + weight else 0
            changed[weight] = max(changed.get(weight, 0), sizes[weight], own)
    return None if whole is None else min(whole, sum(changed.values()))


def _changed_weight(name: str, base: Mapping[str, int]) -> str | None:
    """Return the base's weight that merging a tensor of an adapter changes; ``None`` if its name does not tell."""
    place = name.removeprefix(ROOT)
    if place in base:
        return place
    parts = place.split(".")
    found = (".".join((*parts[:end], "weight")) for end in range(len(parts) - 1, 0, -1))
    return next((weight for weight in found if weight in base), None)


def _unpacked(model: ModelFiles, item_bytes: int) -> dict[str, int]:
    """Return the bytes of each quantized weight of a model's files that its load unpacks, by its name.

    transformers unpacks FP8 on a device that has no kernel for it, and others if it is asked to.
    """
    stored = model.config.get("quantization_config")
    stored = stored if isinstance(stored, dict) else {}
    fp8 = stored.get("quant_method") == "fp8" and model.spec.device in ("cpu", "mps")
    if not (fp8 or unpacks(model.spec.model_kwargs)):
        return {}
    groups = stored.get("config_groups")
    bits = [group["weights"]["num_bits"] for group in groups.values()] if isinstance(groups, dict) else []
    in_a_word = 32 // max(bits, default=32)
    return {
        name: entry.numel * item_bytes * (in_a_word if name.endswith(".weight_packed") else 1)
        for name, entry in (model.entries or {}).items()
        if not entry.floating and name.endswith((".weight", ".weight_packed"))
    }


def _quantized_on_load(model: ModelFiles, item_bytes: int) -> dict[str, int] | None:
    """Return the bytes of each weight that a load quantizes, by its name; ``None`` if the format's are not known.

    Args:
        model: The model, whose entries are known.
        item_bytes: The size of an element of those that are not quantized.
    """
    config, entries = model.config, model.entries or {}
    quantization = as_mapping(model.spec.model_kwargs).get("quantization_config")
    if not quantization or config.get("quantization_config"):
        return {}
    method = method_of(quantization)
    skipped = quantization.get("llm_int8_skip_modules") or quantization.get("modules_to_not_convert") or []
    sizes = {}
    for name, entry in entries.items():
        if not _is_linear(name, entry, config, skipped):
            continue
        rows = entry.shape[0]
        if quantization.get("load_in_4bit"):
            scales = -(-entry.numel // _BLOCK)
            nested = scales + 4 * -(-scales // _NESTED_BLOCK) + _NESTED_CODE
            scale_bytes = nested if quantization.get("bnb_4bit_use_double_quant") else 4 * scales
            sizes[name] = -(-entry.numel // 2) + scale_bytes + _CODE
        elif quantization.get("load_in_8bit"):
            sizes[name] = entry.numel + 4 * rows
        elif method == "torchao" and (each := _TORCHAO_BYTES.get(_torchao_type(quantization))):
            sizes[name] = int(entry.numel * each) + item_bytes * rows
        else:
            return None
    return sizes


def _torchao_type(quantization: Mapping[str, Any]) -> str:
    kind = quantization.get("quant_type")
    if isinstance(kind, dict):
        kind = (kind.get("default") or {}).get("_type")
    return named_type(str(kind))


def _is_linear(name: str, entry: TensorEntry, config: Mapping[str, Any], skipped: list[str]) -> bool:
    """Return whether a tensor is the weight of a linear layer that is quantized: embeddings and heads are not."""
    if not (name.endswith(".weight") and entry.floating and len(entry.shape) == 2):
        return False
    if any(f".{module}." in f".{name}" for module in skipped):
        return False
    of_tokens = config.get("vocab_size") in entry.shape and not skipped
    return not (of_tokens or any(part in name for part in ("embed", "wte", "wpe")))


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
    if "modules_to_save" not in name and "original_module" not in name:
        return False
    parts = [part for part in name.split(".") if part not in ("modules_to_save", "original_module")]
    return ".".join(parts) != name and ".".join(parts) in (files.entries or ())


def _keeps_tied(files: AdapterFiles) -> bool:
    return bool(files.config.get("ensure_weight_tying"))
