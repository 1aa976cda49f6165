"""Writes a base's files in each quantized format."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

UNPACKED: Final = {"quant_method": "compressed-tensors", "run_compressed": False}
"""PEFT puts no adapter on packed layers."""

_FP8_BLOCK: Final = 32
_INT4_GROUP: Final = 32
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""The order of eight numbers of 4 bits in a word of AWQ's files, the lowest bits first."""


def nf4(base: Path, folder: Path) -> None:
    import torch
    import transformers

    config_class: Any = transformers.BitsAndBytesConfig
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    _by_transformers(base, folder, config_class(load_in_4bit=True, **settings))


def int8(base: Path, folder: Path) -> None:
    import transformers

    config_class: Any = transformers.BitsAndBytesConfig
    _by_transformers(base, folder, config_class(load_in_8bit=True))


def torchao(base: Path, folder: Path) -> None:
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    config_class: Any = transformers.TorchAoConfig
    _by_transformers(base, folder, config_class(quant_type=Int8WeightOnlyConfig()))


def torchao_on_one_scale(base: Path, folder: Path) -> None:
    """Write a base whose activations get one scale for a whole pass."""
    import transformers
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerTensor

    config_class: Any = transformers.TorchAoConfig
    kind: Any = Int8DynamicActivationInt8WeightConfig
    _by_transformers(base, folder, config_class(quant_type=kind(granularity=PerTensor())))


def compressed_on_one_scale(base: Path, folder: Path) -> None:
    """Write a base whose activations get one scale for a whole pass."""
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": True}
    compressed(base, folder, "int-quantized", input_activations=activations)


def compressed(base: Path, folder: Path, form: str = "pack-quantized", **further: Any) -> None:
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights} | further}
    settings: Any = {"format": form, "quantization_status": "frozen"}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], **settings))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().abs().amax(1, keepdim=True) / 127
    compressor: Any = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def fp8(base: Path, folder: Path) -> None:
    """Write a base as DeepSeek's FP8 checkpoints are: blocks of weights with their scales."""
    _by_layer(base, folder, _fp8_layer)
    quantization = {"quant_method": "fp8", "weight_block_size": [_FP8_BLOCK] * 2, "activation_scheme": "dynamic"}
    _edit_config(folder, quantization_config=quantization | {"modules_to_not_convert": ["lm_head"]})


def gptq(base: Path, folder: Path) -> None:
    """Write a base as GPTQ's checkpoints are, each weight rounded to the nearest of its group's 16 numbers."""
    _by_layer(base, folder, _gptq_layer)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": _INT4_GROUP, "desc_act": False, "sym": False}
    _edit_config(folder, quantization_config=quantization | {"backend": "torch_fused"})


def awq(base: Path, folder: Path) -> None:
    """Write a base as AWQ's checkpoints are, each weight rounded to the nearest of its group's 16 numbers."""
    _by_layer(base, folder, _awq_layer)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": _INT4_GROUP, "zero_point": True, "version": "gemm"}
    _edit_config(folder, quantization_config=quantization | {"backend": "torch_awq"})


FORMATS: Final[dict[str, Callable[[Path, Path], None]]] = {
    "bitsandbytes nf4": nf4,
    "bitsandbytes int8": int8,
    "torchao int8": torchao,
    "compressed-tensors": compressed,
    "fp8": fp8,
    "gptq": gptq,
    "awq": awq,
}


def loading(name: str) -> dict[str, Any]:
    """Return the ``model_kwargs`` with which adapters go on a base in a format."""
    return {"quantization_config": UNPACKED} if FORMATS[name] is compressed else {}


def _by_transformers(base: Path, folder: Path, config: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)


def _by_layer(base: Path, folder: Path, quantized: Callable[[Any], dict[str, Any]]) -> None:
    """Copy a base, and write what ``quantized`` makes of the weight of each of its layers' projections."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = load_file(base / "model.safetensors")
    for name, weight in plain.items():
        if "_proj" in name:
            layer = name.removesuffix("weight")
            tensors |= {f"{layer}{part}": tensor for part, tensor in quantized(weight).items()}
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _fp8_layer(weight: Any) -> dict[str, Any]:
    import torch

    blocks = weight.unflatten(0, (-1, _FP8_BLOCK)).unflatten(2, (-1, _FP8_BLOCK))
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    stored = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return {"weight": stored.to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def _gptq_layer(weight: Any) -> dict[str, Any]:
    import torch

    numbers, zeros, scales = _int4(weight)
    groups = torch.arange(len(numbers), dtype=torch.int32) // _INT4_GROUP
    words = {"qweight": _packed(numbers.T).T.contiguous(), "qzeros": _packed(zeros - 1)}
    return words | {"scales": scales, "g_idx": groups}


def _awq_layer(weight: Any) -> dict[str, Any]:
    numbers, zeros, scales = _int4(weight)
    return {"qweight": _packed(numbers, _AWQ_ORDER), "qzeros": _packed(zeros, _AWQ_ORDER), "scales": scales}


def _int4(weight: Any) -> tuple[Any, Any, Any]:
    """Return a weight's numbers from 0 to 15 (inputs x outputs), and its groups' zeros and scales."""
    grouped = weight.T.unflatten(0, (-1, _INT4_GROUP))
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(1, 15)
    numbers = (grouped / scales[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1)
    return numbers, zeros, scales


def _packed(numbers: Any, order: Sequence[int] = range(8)) -> Any:
    """Pack each eight numbers of 4 bits in a row into a word of 32 bits."""
    import torch

    eights = numbers.to(torch.int64).unflatten(-1, (-1, 8))
    words: Any = sum(eights[..., n] << (4 * place) for place, n in enumerate(order))
    return words.to(torch.int32).contiguous()
