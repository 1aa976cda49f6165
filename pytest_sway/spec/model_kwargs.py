"""``model_kwargs``: what transformers' ``from_pretrained`` takes besides, as plain values, kept as JSON text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from numbers import Number
from typing import Any, Final

from pytest_sway.errors import SpecError
from pytest_sway.spec.tasks import is_causal

__tracebackhide__ = True

_NF4: Final = "{'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4'}"
_QUANTIZED: Final = f"To quantize it on load, write model_kwargs={{'quantization_config': {_NF4}}}."
_QUANTIZED_INT8: Final = "To quantize it on load, write model_kwargs={'quantization_config': {'load_in_8bit': True}}."
_DTYPE: Final = "Write dtype='bf16' (or 'fp16', 'fp32') in the spec."
_PICKLE: Final = "Say allow_pickle=True in the spec to read pickles."

_REFUSED: Final = {
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "pretrained_model_name_or_path": "Name the model as 'base' in the spec.",
    "gguf_file": "Name the .gguf file as 'base' in the spec.",
    "subfolder": "Name the folder itself as 'base' in the spec.",
    "revision": "Write revision= in the spec.",
    "trust_remote_code": "Write trust_remote_code= in the spec.",
    "use_safetensors": _PICKLE,
    "weights_only": _PICKLE,
    "adapter_kwargs": "Name an adapter as 'adapter' in the spec.",
    "adapter_name": "Name an adapter as 'adapter' in the spec.",
    "config": "It is read from the base's folder; single fields of it go into model_kwargs by their names.",
    "state_dict": "The weights are read from the base's folder.",
    "ignore_mismatched_sizes": "Weights of other sizes would be replaced by noise.",
    "output_loading_info": "pytest-sway reads it itself, and refuses models that lack weights.",
    "return_unused_kwargs": "pytest-sway tells of them itself.",
    "token": "Set the environment variable HF_TOKEN.",
    "use_auth_token": "Set the environment variable HF_TOKEN.",
    "local_files_only": "Run pytest with --sway-offline.",
    "cache_dir": "Set the environment variable HF_HUB_CACHE.",
    "force_download": "Remove the model from the hub's cache.",
    "proxies": "Set the environment variable HTTPS_PROXY.",
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": "Write 'quantization_config': {'load_in_8bit': True} in model_kwargs.",
}
"""What pytest-sway sets itself, or does not let be set, and what to do in its place."""

KNOWN: Final = (
    "attn_implementation", "code_revision", "device_map", "device_mesh", "distributed_config", "experts_implementation",
    "generation_config", "kernel_config", "key_mapping", "low_cpu_mem_usage", "max_memory", "offload_buffers",
    "offload_folder", "offload_state_dict", "quantization_config", "tp_plan", "tp_size", "use_kernels", "variant",
)  # fmt: skip
"""Names that ``from_pretrained`` takes, beside the fields of a model's config."""

_FORMS: Final = {
    **{name: f"It is model_kwargs={{{name!r}: ...}}." for name in KNOWN},
    "attn_implementation": "Write model_kwargs={'attn_implementation': 'eager'}.",
    "device_map": "Write device='cuda:0' for one device, or model_kwargs={'device_map': 'auto'} for several.",
    "torch_dtype": "Write dtype='bf16' (or 'fp16', 'fp32').",
    **dict.fromkeys(("quantization", "quantization_config", "quantize", "load_in_4bit", "bits"), _QUANTIZED),
    **dict.fromkeys(("nf4", "fp4", "int4", "4bit"), _QUANTIZED),
    **dict.fromkeys(("load_in_8bit", "int8", "8bit"), _QUANTIZED_INT8),
    **dict.fromkeys(("model", "base_model", "model_name", "model_id", "model_name_or_path"), "It is 'base'."),
    **dict.fromkeys(("peft", "lora", "peft_model", "lora_path", "adapter_name_or_path"), "It is 'adapter'."),
    "subfolder": "Write adapter_subfolder='...'.",
}


def form_of(name: str) -> str | None:
    """Return the sentence that says how a spec expresses what people write as a field ``name``."""
    return _QUANTIZED if name.startswith("bnb_4bit_") else _FORMS.get(name) or _REFUSED.get(name)


def canonical(field: str, value: object) -> str:
    """Return keyword arguments as JSON text, equal for equal ones in any order.

    Args:
        field: The spec field that holds them.
        value: A mapping, or JSON text of one.

    Raises:
        SpecError: It is neither, holds what is no plain value, or an argument that pytest-sway sets itself.
    """
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, Mapping):
        raise SpecError(
            f"spec field {field!r} must be a mapping of what transformers' from_pretrained takes, such as"
            f" {{'attn_implementation': 'eager'}}; found {value!r}."
        )
    for name in value:
        if name in _REFUSED:
            raise SpecError(f"spec field {field!r} must not have {name!r}. {_REFUSED[name]}")
    quantization = value.get("quantization_config", {})
    if not hasattr(quantization, "to_dict") and not isinstance(quantization, Mapping):
        raise SpecError(
            f"'quantization_config' in spec field {field!r} must be a mapping, such as {_NF4}; found {quantization!r}."
        )
    try:
        return json.dumps(_plain(field, "", value), sort_keys=True, allow_nan=False)
    except RecursionError:
        raise SpecError(f"spec field {field!r} is nested too deep, or holds itself.") from None


def as_mapping(kept: object) -> dict[str, Any]:
    """Return keyword arguments that a spec keeps as a new mapping; empty for ``None``."""
    return json.loads(kept) if isinstance(kept, str) else {}


def quantization_of(kept: object, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a model's quantization: its files' own, else that of its keyword arguments; ``None`` for none.

    Args:
        kept: The keyword arguments, as its spec keeps them.
        config: What its config.json says.
    """
    for found in (config.get("quantization_config"), as_mapping(kept).get("quantization_config")):
        if isinstance(found, dict) and found:
            return found
    return None


def method_of(quantization: Mapping[str, Any]) -> str:
    """Return the name of a quantization's method."""
    bitsandbytes = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    return "bitsandbytes" if bitsandbytes else str(quantization.get("quant_method"))


def unpacks(kept: object) -> bool:
    """Return whether keyword arguments ask for a quantized file's weights to be unpacked on load."""
    return _is_unpacking(as_mapping(kept).get("quantization_config") or {})


def _is_unpacking(quantization: Mapping[str, Any]) -> bool:
    return bool(quantization.get("dequantize")) or quantization.get("run_compressed") is False


def named_type(kind: str) -> str:
    """Return the class of torchao that a type of quantization means: ``int8_weight_only`` in older versions."""
    if "_" not in kind:
        return kind
    return f"{''.join(word.capitalize() for word in kind.split('_'))}Config"


def in_short(kept: object, task: str | None = None) -> str:
    """Return what a label says of how a model is loaded: `` (nf4, eager)``; nothing where nothing is said.

    Args:
        kept: Its keyword arguments, as its spec keeps them.
        task: Its task.
    """
    words = [] if is_causal(task) else [str(task)]
    words += [_word(name, value) for name, value in as_mapping(kept).items()]
    return f" ({', '.join(words)})" if words else ""


def _word(name: str, value: Any) -> str:
    if name == "quantization_config":
        return _quantization(value)
    if name == "attn_implementation":
        return str(value)
    return f"{name}={value}" if isinstance(value, str | int | float) and "/" not in str(value) else name


def _quantization(config: Mapping[str, Any]) -> str:
    if config.get("load_in_4bit"):  # where nothing says the type, it is that of files in four bits, else fp4
        return str(config.get("bnb_4bit_quant_type", "4-bit"))
    if config.get("load_in_8bit"):
        return "int8"
    kind, method = config.get("quant_type"), config.get("quant_method", "quantized")
    if isinstance(kind, Mapping):
        kind = (kind.get("default") or {}).get("_type") if isinstance(kind.get("default"), Mapping) else None
    unpacked = " unpacked" if _is_unpacking(config) else ""
    return f"{method} {kind}" if isinstance(kind, str) else f"{method}{unpacked}"


def _plain(field: str, place: str, value: object) -> Any:
    """Return a value as JSON has it.

    Raises:
        SpecError: JSON does not have it.
    """
    if isinstance(value, Mapping):
        return {_key(field, place, key): _plain(field, f"{place}[{key!r}]", value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_plain(field, f"{place}[{i}]", each) for i, each in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    what, advice = repr(value), "use texts, numbers, true, false, None, lists and mappings."
    if isinstance(value, Number) and hasattr(value, "item"):
        advice = f"write {value.item()!r}."
    elif type(value).__module__ == "torch":
        advice = f"write {str(value).removeprefix('torch.')!r}."
    elif hasattr(value, "to_dict"):
        what, advice = f"a {type(value).__name__}", f"write its settings as a mapping, such as {_NF4}."
    raise SpecError(f"spec field {field!r} holds plain values, and {field}{place} is {what}: {advice}")


def _key(field: str, place: str, key: object) -> str:
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise SpecError(
            f"spec field {field!r} has the key {key!r} in {field}{place}; a key must be a text or a number."
        )
    return str(key)
