"""Putting plain LoRA on a base that has PEFT's layers already.

It comes to the same as ``load_adapter``, bit by bit, in a fraction of the time: that one matches every module of the
model against every layer of every adapter there is, and walks all of them a dozen times.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.adapter import ROOT, Adapter
from pytest_sway.backends.hf.adapter_files import WEIGHTS
from pytest_sway.backends.hf.pickles import read_pickle

if TYPE_CHECKING:
    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.base import LoadedBase

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

# Fields of a config that do not show in the layers that PEFT makes of it.
_UNSEEN_FIELDS: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "peft_version", "revision"}
)

PLAN_NAME: Final = "sway-plan"
"""Stands for an adapter's name while PEFT shows how it would put one on."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlan:
    """What PEFT puts into one layer for one configuration.

    Attributes:
        key: The name of the module in whose place the layer is.
        layer: PEFT's layer.
        parts: By the attribute of the layer that holds it, what an adapter has there; modules are without weights.
    """

    key: str
    layer: Any
    parts: dict[str, Any]

    @property
    def tensors(self) -> tuple[str, str]:
        """The names of the file's tensors for A and B."""
        return f"{ROOT}{self.key}.lora_A.weight", f"{ROOT}{self.key}.lora_B.weight"


def graft(base: LoadedBase, files: AdapterFiles, name: str) -> Adapter | None:
    """Put an adapter on as ``load_adapter`` would; ``None``, and nothing done, if there is anything special about it.

    Raises:
        RuntimeError: A tensor's shape is not that of its place.
    """
    if base.peft_model is None or not files.shareable or files.entries is None:
        return None
    config = _config(files)
    plans = base.plans.get(_signature(config))
    if plans is None:
        plans = _made_by_peft(base, files, config)
        if plans is None:
            return None
        base.plans[_signature(config)] = plans
    if {name for plan in plans for name in plan.tensors} != set(files.entries):
        return None
    base.peft_model.peft_config[name] = config
    weights = _read_tensors(files, str(base.device))
    adapter = Adapter(name, files, {}, {}, [], [])
    for plan in plans:
        _copy_in(plan, name, weights, adapter)
    return adapter


def _config(files: AdapterFiles) -> Any:
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(files.folder))
    config.inference_mode = True
    return config


def _signature(config: Any) -> str:
    """Equal for configurations of which PEFT makes the same layers."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _UNSEEN_FIELDS}
    return json.dumps(
        fields, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )


def remember(base: LoadedBase, files: AdapterFiles, name: str) -> None:
    """Keep what PEFT has made of an adapter, without its weights, as the plan for others of the same configuration."""
    config = base.peft_model.peft_config[name]
    keys = _plain_targets(base, files, config)
    if keys is not None:
        base.plans[_signature(config)] = [_layer_plan(base, key, name) for key in keys]


def _made_by_peft(base: LoadedBase, files: AdapterFiles, config: Any) -> list[LayerPlan] | None:
    """Have PEFT make its layers for a configuration that it has made none for yet."""
    keys = _plain_targets(base, files, config)
    if keys is None:
        return None
    bare = copy.copy(config)
    bare.init_lora_weights = False
    plans = []
    for key in keys:
        children, child = base.places[key]
        parent = base.model.get_submodule(key.rpartition(".")[0])
        base.peft_model.base_model._create_and_replace(bare, PLAN_NAME, children[child], child, parent, current_key=key)
        plans.append(_layer_plan(base, key, PLAN_NAME))
        layer = children[child]
        layer._active_adapter = []
        layer.delete_adapter(PLAN_NAME)
        layer.eval()
        layer.requires_grad_(False)  # of the adapters that were there too: some versions of PEFT make them trainable
    return plans


def _plain_targets(base: LoadedBase, files: AdapterFiles, config: Any) -> list[str] | None:
    """The modules that a configuration is for; ``None`` if it needs more than the pair of matrices at each of them."""
    if not isinstance(config.target_modules, set | list) or config.use_dora or getattr(config, "lora_bias", False):
        return None
    tuner = base.peft_model.base_model
    keys = [key for key in base.places if tuner._check_target_module_exists(config, key)]
    wanted = {f"{ROOT}{key}.lora_{part}.weight" for key in keys for part in "AB"}
    return keys if wanted == set(files.entries or ()) and all(_is_linear(base, key) for key in keys) else None


def _layer_plan(base: LoadedBase, key: str, name: str) -> LayerPlan:
    children, child = base.places[key]
    layer = children[child]
    holders = {
        attribute: getattr(layer, attribute) for attribute in layer.adapter_layer_names + layer.other_param_names
    }
    parts = {
        attribute: holder[name] if isinstance(holder, dict) else _copied(holder[name])
        for attribute, holder in holders.items()
        if name in holder
    }
    for module in (parts["lora_A"], parts["lora_B"], parts["lora_dropout"]):
        module.training = False
        module._parameters.update(dict.fromkeys(module._parameters))
    return LayerPlan(key, layer, parts)


def _copy_in(plan: LayerPlan, name: str, weights: dict[str, Any], adapter: Adapter) -> None:
    """Give a layer the parts of another adapter, and these the adapter's weights."""
    layer = plan.layer
    for attribute, part in plan.parts.items():
        holder = getattr(layer, attribute)
        if isinstance(holder, dict):
            holder[name] = part
        else:
            holder[name] = _copied(part)
    for letter, tensor_name in zip("AB", plan.tensors, strict=True):
        linear = getattr(layer, f"lora_{letter}")[name]
        _set_weight(linear, weights[tensor_name])
        module_name = f"{ROOT}{plan.key}.lora_{letter}.{name}"
        adapter.modules.append((module_name, linear))
        adapter.parameters[f"{module_name}.weight"] = linear.weight
        adapter.owners[f"{module_name}.weight"] = (linear._parameters, "weight")
    adapter.modules.append((f"{ROOT}{plan.key}.lora_dropout.{name}", layer.lora_dropout[name]))
    adapter.scalings.append(layer.scaling)


def _copied(module: Any) -> Any:
    """A module like another, that shares none of its dictionaries of parameters and hooks."""
    copied = copy.copy(module)
    copied.__dict__.update({key: value.copy() for key, value in vars(module).items() if isinstance(value, dict)})
    return copied


def _set_weight(linear: Any, tensor: Any) -> None:
    import torch

    if tensor.shape != (linear.out_features, linear.in_features):
        raise RuntimeError(
            f"size mismatch: {tuple(tensor.shape)} in the file, {(linear.out_features, linear.in_features)} here."
        )
    # PEFT keeps adapters in float32, whatever the base computes in
    weight = torch.nn.Parameter(tensor.to(torch.float32, copy=True), requires_grad=False)
    linear._parameters["weight"] = weight


def _is_linear(base: LoadedBase, key: str) -> bool:
    import torch
    from peft.tuners.lora import Linear

    children, child = base.places[key]
    module = children[child]
    return type(module.base_layer if type(module) is Linear else module) is torch.nn.Linear


def _read_tensors(files: AdapterFiles, device: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    path = files.folder / WEIGHTS
    return dict(load_file(str(path), device=device)) if path.is_file() else read_pickle(files, device)
