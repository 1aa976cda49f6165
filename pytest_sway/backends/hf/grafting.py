"""Putting plain LoRA on a base that has PEFT's layers already.

It comes to the same as ``load_adapter``, bit by bit, in a quarter of the time: that one matches every module of the model
against every layer of every adapter there is, and walks all of them a dozen times.
"""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.adapter import ROOT, Adapter
from pytest_sway.backends.hf.adapter_files import WEIGHTS

if TYPE_CHECKING:
    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.base import LoadedBase


def graft(base: LoadedBase, files: AdapterFiles, name: str) -> Adapter | None:
    """Put an adapter on as ``load_adapter`` would; ``None``, and nothing done, if there is anything special about it.

    Raises:
        RuntimeError: A tensor's shape is not that of its place.
    """
    plan = _plan(base, files)
    if plan is None:
        return None
    config, pairs = plan
    weights = _read_tensors(files, str(base.device))
    uninitialised = copy.copy(config)
    uninitialised.init_lora_weights = False
    base.peft_model.peft_config[name] = config
    adapter = Adapter(name, files, {}, {}, [], [])
    for key, names in pairs.items():
        layer = _layer(base, uninitialised, name, key)
        adapter.scalings.append(layer.scaling)
        for part, tensor_name in zip((layer.lora_A[name], layer.lora_B[name]), names, strict=True):
            _set_weight(part, weights[tensor_name])
            own_name = f"{tensor_name.removesuffix('.weight')}.{name}.weight"
            adapter.parameters[own_name] = part.weight
            adapter.owners[own_name] = (part._parameters, "weight")
            adapter.modules.append((own_name.removesuffix(".weight"), part))
        adapter.modules.append((f"{ROOT}{key}.lora_dropout.{name}", layer.lora_dropout[name]))
    return adapter


def _plan(base: LoadedBase, files: AdapterFiles) -> tuple[Any, dict[str, tuple[str, str]]] | None:
    """The adapter's config, and for each module that it targets, the names of its two tensors."""
    if base.peft_model is None or not files.shareable or files.entries is None:
        return None
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(files.folder))
    config.inference_mode = True
    if not isinstance(config.target_modules, set | list) or config.use_dora or getattr(config, "lora_bias", False):
        return None
    tuner = base.peft_model.base_model
    modules = [key for key in base.places if tuner._check_target_module_exists(config, key)]
    pairs = {key: (f"{ROOT}{key}.lora_A.weight", f"{ROOT}{key}.lora_B.weight") for key in modules}
    fits = set(itertools.chain(*pairs.values())) == set(files.entries)
    return (config, pairs) if fits and all(_is_linear(base, key) for key in modules) else None


def _layer(base: LoadedBase, config: Any, name: str, key: str) -> Any:
    """PEFT's layer in a module's place, with an empty adapter in it, in evaluation mode."""
    children, child = base.places[key]
    before = children[child]
    parent = base.model.get_submodule(key.rpartition(".")[0])
    base.peft_model.base_model._create_and_replace(config, name, before, child, parent, current_key=key)
    layer = children[child]
    if layer is not before:
        layer.eval()
        layer.requires_grad_(False)
    for part in (layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]):
        part.training = False
    return layer


def _set_weight(linear: Any, tensor: Any) -> None:
    import torch

    if linear.weight.shape != tensor.shape:
        raise RuntimeError(f"size mismatch: {tuple(tensor.shape)} in the file, {tuple(linear.weight.shape)} here.")
    # PEFT keeps adapters in float32, whatever the base computes in
    linear.weight = torch.nn.Parameter(tensor.to(torch.float32, copy=True), requires_grad=False)


def _is_linear(base: LoadedBase, key: str) -> bool:
    import torch
    from peft.tuners.lora import Linear

    children, child = base.places[key]
    module = children[child]
    return type(module.base_layer if type(module) is Linear else module) is torch.nn.Linear


def _read_tensors(files: AdapterFiles, device: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(str(files.folder / WEIGHTS), device=device))
