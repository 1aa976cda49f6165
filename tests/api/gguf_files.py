"""Writes files for llama.cpp: the weights of a model as float32, and a PEFT adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODULES = {"v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "down_proj": "ffn_down"}
"""GGUF's names of a Llama's modules, without query and key, whose rows llama.cpp stores in another order."""


def write_float32(source: Path, target: Path, **metadata: Any) -> Path:
    """Write the model in ``source`` with its weights dequantised to float32.

    Args:
        source: A GGUF file.
        target: The file to write.
        metadata: Fields of the file to change, with two underscores for each dot in their names.
    """
    from gguf import GGUFReader, GGUFValueType
    from gguf.quants import dequantize

    changed = {name.replace("__", "."): value for name, value in metadata.items()}
    reader = GGUFReader(source)
    writer = _writer(target)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            of = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, changed.get(name, field.contents()), field.types[0], sub_type=of)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.reshape(tuple(reversed(tensor.shape.tolist()))))
    return _finished(writer, target)


def write_adapter(folder: Path, target: Path) -> Path:
    """Write the PEFT LoRA adapter in ``folder``, whose modules are in `MODULES`."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    writer = _writer(target)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
    for name, values in load_file(folder / "adapter_model.safetensors").items():
        layer, _, module, matrix = name.split(".layers.")[1].split(".")[:4]
        writer.add_tensor(f"blk.{layer}.{MODULES[module]}.weight.{matrix.lower()}", values)
    return _finished(writer, target)


def _writer(target: Path) -> Any:
    from gguf import GGUFWriter

    return GGUFWriter(target, "llama")


def _finished(writer: Any, target: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
