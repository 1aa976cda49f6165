"""Putting an adapter on a loaded base, making sure that it is really there, and taking it off."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.libraries import quiet_process
from pytest_sway.backends.hf.verification import verify_keys, verify_values
from pytest_sway.errors import AdapterMismatchError, SpecError, WeightsError

if TYPE_CHECKING:
    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.base import LoadedBase

_numbers: Final = itertools.count()
_ROOT: Final = "base_model.model."


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter on a base.

    Attributes:
        name: Its name within PEFT; unlike any other's, and part of none.
        files: What it was loaded from.
        parameters: Its parameters by their names in the ``PeftModel``, in the order of ``named_parameters()``.
        owners: For each of those names, the dictionary that holds the parameter, and its key there.
        scalings: The dictionaries of its LoRA layers that hold its scaling, a factor without unit, under its name.
    """

    name: str
    files: AdapterFiles
    parameters: dict[str, Any]
    owners: dict[str, tuple[dict[str, Any], str]]
    scalings: list[dict[str, float]]


def put_on(base: LoadedBase, files: AdapterFiles) -> Adapter:
    """Put an adapter on a base and verify it; the base's own weights stay as they are, unless it is the adapter's own.

    Raises:
        AdapterMismatchError: It does not fit the base, was not applied in full, is not finite, or does nothing.
        WeightsError: Its file of weights cannot be read.
    """
    # PEFT looks for adapters by asking whether their name is in a parameter's: the x ends it, so that none is in another
    name = f"sway{next(_numbers):04d}x"
    with base.lock:
        try:
            with quiet_process():
                _apply(base, files, name)
            adapter = _describe(base, files, name)
            verify_values(base.spec, adapter)
        except BaseException:
            _remove(base, name)
            if not base.adapters:
                _unwrap(base)
            base.refresh()
            raise
        base.adapters[name] = adapter
        base.refresh()
        return adapter


def take_off(base: LoadedBase, adapter: Adapter) -> None:
    """Remove an adapter from its base; what it was put on stays loaded."""
    with base.lock:
        _remove(base, adapter.name)
        base.adapters.pop(adapter.name, None)
        base.refresh()


def _apply(base: LoadedBase, files: AdapterFiles, name: str) -> None:
    from safetensors import SafetensorError

    try:
        if not _graft(base, files, name):
            _load_with_peft(base, files, name)
    except (SafetensorError, EOFError) as error:
        raise WeightsError(f"the weights of the adapter {str(files.folder)!r} cannot be read: {error}.") from error
    except KeyError as error:
        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} was not applied to {base.spec.base!r}: its config asks for"
            f" {error.args[0]!r}, which its weights lack. Save the adapter again, config and weights together."
        ) from error
    except (RuntimeError, ValueError) as error:
        if "size mismatch" not in str(error) and "target" not in str(error).lower():
            raise
        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} does not fit the base {base.spec.base!r}: {_shortened(error)}"
            " Name the base that it was trained on."
        ) from error
    peft_model = base.peft_model
    peft_model.eval()
    peft_model.requires_grad_(False)


def _load_with_peft(base: LoadedBase, files: AdapterFiles, name: str) -> None:
    """Do as ``PeftModel.from_pretrained`` does, and look at what it does not look at: the keys that did not match."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if files.peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise SpecError(
            f"the adapter {str(files.folder)!r} is of the type {files.peft_type!r}, which the installed PEFT"
            f" {peft.__version__} does not know. Upgrade PEFT."
        )
    config = PEFT_TYPE_TO_CONFIG_MAPPING[files.peft_type].from_pretrained(str(files.folder))
    config.inference_mode = True
    if base.peft_model is None:
        kind = peft.PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else peft.PeftModel
        base.peft_model = kind(base.model, config, name)
    key_mapping = None if config.is_prompt_learning else getattr(base.model, "_checkpoint_conversion_mapping", {})
    result = base.peft_model.load_adapter(
        str(files.folder), name, torch_device=str(base.device), key_mapping=key_mapping
    )
    verify_keys(base.spec, files, result.missing_keys, result.unexpected_keys)


def _graft(base: LoadedBase, files: AdapterFiles, name: str) -> bool:
    """Put plain LoRA on a base that has PEFT's layers already; return whether that was possible.

    It comes to the same as ``load_adapter``, bit by bit, in a quarter of the time: that matches each module against the
    layers of each adapter that is there. Anything out of the ordinary is left to it.
    """
    if base.peft_model is None or not files.shareable or files.entries is None:
        return False
    from peft import LoraConfig

    tuner = base.peft_model.base_model
    config = LoraConfig.from_pretrained(str(files.folder))
    config.inference_mode = True
    if not isinstance(config.target_modules, set | list) or config.use_dora or getattr(config, "lora_bias", False):
        return False
    modules = [key for key in base.places if tuner._check_target_module_exists(config, key)]
    pairs = {key: (f"{_ROOT}{key}.lora_A.weight", f"{_ROOT}{key}.lora_B.weight") for key in modules}
    if set(itertools.chain(*pairs.values())) != set(files.entries) or not all(_is_linear(base, key) for key in modules):
        return False
    uninitialised = copy.copy(config)
    uninitialised.init_lora_weights = False
    base.peft_model.peft_config[name] = config
    weights = _read_tensors(files, str(base.device))
    for key, names in pairs.items():
        children, child = base.places[key]
        parent = base.model.get_submodule(key.rpartition(".")[0])
        tuner._create_and_replace(uninitialised, name, children[child], child, parent, current_key=key)
        layer = children[child]
        for part, tensor_name in zip((layer.lora_A, layer.lora_B), names, strict=True):
            _set_weight(part[name], weights[tensor_name])
    return True


def _set_weight(linear: Any, tensor: Any) -> None:
    import torch

    if linear.weight.shape != tensor.shape:
        raise RuntimeError(
            f"size mismatch: {tuple(tensor.shape)} in the file, {tuple(linear.weight.shape)} in the model."
        )
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

    from pytest_sway.backends.hf.adapter_files import WEIGHTS

    return dict(load_file(str(files.folder / WEIGHTS), device=device))


def _describe(base: LoadedBase, files: AdapterFiles, name: str) -> Adapter:
    """Find what of the model is the adapter's."""
    from peft.tuners.lora import LoraLayer

    parameters: dict[str, Any] = {}
    owners: dict[str, tuple[dict[str, Any], str]] = {}
    scalings: list[dict[str, float]] = []
    for prefix, module in base.peft_model.named_modules():
        own = f".{name}." in f".{prefix}."
        for key, parameter in module._parameters.items():
            if parameter is not None and (own or key == name):
                parameters[f"{prefix}.{key}"] = parameter
                owners[f"{prefix}.{key}"] = (module._parameters, key)
        if isinstance(module, LoraLayer) and name in module.scaling:
            scalings.append(module.scaling)
    return Adapter(name, files, parameters, owners, scalings)


def _remove(base: LoadedBase, name: str) -> None:
    """Take away whatever there is of an adapter, also of one that was put on in part."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base.switch.leave(name)
    for module in list(base.model.modules()):
        if isinstance(module, BaseTunerLayer):
            if name in module.active_adapters:  # or PEFT would choose another one, and warn of it
                module._active_adapter = []
            module.delete_adapter(name)
    if base.peft_model is not None:
        base.peft_model.peft_config.pop(name, None)


def _unwrap(base: LoadedBase) -> None:
    """Put the base's own modules back in the places of PEFT's layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for children, key in base.places.values():
        if isinstance(children[key], BaseTunerLayer):
            children[key] = children[key].get_base_layer()
    base.model.__dict__.pop("peft_config", None)
    base.peft_model = None


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:300] + "..."
    return text if text.endswith(".") else text + "."
