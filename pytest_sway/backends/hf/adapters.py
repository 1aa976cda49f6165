"""Putting an adapter on a loaded base, making sure that it is really there, and taking it off."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.adapter import Adapter
from pytest_sway.backends.hf.grafting import PLAN_NAME, graft, remember
from pytest_sway.backends.hf.libraries import quiet_process, seeded
from pytest_sway.backends.hf.verification import verify_keys, verify_trained, verify_values
from pytest_sway.errors import AdapterMismatchError, BackendNotAvailableError, SpecError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.base import LoadedBase

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_numbers: Final = itertools.count()


def put_on(base: LoadedBase, files: AdapterFiles) -> Adapter:
    """Put an adapter on a base and verify it; the base's own weights stay as they are, unless it is the adapter's own.

    Raises:
        AdapterMismatchError: It does not fit the base, was not applied in full, is not finite, or does nothing.
        WeightsError: Its file of weights cannot be read.
    """
    # PEFT asks whether an adapter's name is part of a parameter's name; ending in x, none is part of another
    name = f"sway{next(_numbers):04d}x"
    with base.lock:
        try:
            adapter = _apply(base, files, name)
            verify_values(base, adapter)
        except BaseException:
            _remove(base, name)
            if not base.adapters:
                _unwrap(base)
            base.model.requires_grad_(False)  # PEFT may have been stopped before it froze what it had made trainable
            base.refresh()
            raise
        base.adapters[name] = adapter
        if not base.shared:
            base.take_stock(adapter)
        base.refresh()
        return adapter


def take_off(base: LoadedBase, adapter: Adapter) -> None:
    """Remove an adapter from its base; what it was put on stays loaded."""
    with base.lock:
        _remove(base, adapter.name)
        base.adapters.pop(adapter.name, None)
        base.refresh()


def _apply(base: LoadedBase, files: AdapterFiles, name: str) -> Adapter:
    from safetensors import SafetensorError

    try:
        with quiet_process(), seeded(base.device):  # what starts at random, as pissa_niter_*, does so alike each time
            return graft(base, files, name) or _load_with_peft(base, files, name)
    except (SafetensorError, EOFError) as error:
        raise WeightsError(f"the weights of the adapter {str(files.folder)!r} cannot be read: {error}.") from error
    except KeyError as error:
        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} was not applied to {base.spec.base!r}: its config asks for"
            f" {error.args[0]!r}, which its weights lack. Save the adapter again, config and weights together."
        ) from error
    except (ImportError, RuntimeError, ValueError) as error:
        if isinstance(error, ImportError) or "is not available" in str(error):
            raise BackendNotAvailableError(
                f"the adapter {str(files.folder)!r}, of the type {files.peft_type}, needs what this environment lacks:"
                f" {_shortened(error)}"
            ) from error
        if "size mismatch" not in str(error) and "target" not in str(error).lower():
            raise
        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} does not fit the base {base.spec.base!r}: {_shortened(error)}"
            " Name the base that it was trained on."
        ) from error


def _load_with_peft(base: LoadedBase, files: AdapterFiles, name: str) -> Adapter:
    """Do as ``PeftModel.from_pretrained`` does, and look at what it does not look at: the keys that did not match."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    configs: dict[Any, Any] = {**PEFT_TYPE_TO_CONFIG_MAPPING}
    if files.peft_type not in configs:
        raise SpecError(
            f"the adapter {str(files.folder)!r} is of the type {files.peft_type!r}, which the installed PEFT"
            f" {peft.__version__} does not know. Upgrade PEFT."
        )
    config = configs[files.peft_type].from_pretrained(str(files.folder))
    config.inference_mode = True
    if hasattr(config, "progressbar"):
        config.progressbar = False  # FRoD draws one wherever the terminal is
    if base.peft_model is None:
        kind = peft.PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else peft.PeftModel
        base.peft_model = kind(base.model, config, name)
    starts = {} if base.shared or config.is_prompt_learning else _copies(_describe(base, files, name))
    key_mapping = None if config.is_prompt_learning else getattr(base.model, "_checkpoint_conversion_mapping", {})
    result = base.peft_model.load_adapter(
        str(files.folder), name, torch_device=str(base.device), key_mapping=key_mapping
    )
    verify_keys(base.spec, files, _unloaded(base, result.missing_keys), result.unexpected_keys)
    base.peft_model.eval()
    base.peft_model.requires_grad_(False)
    if files.shareable:
        remember(base, files, name)
    adapter = _describe(base, files, name)
    verify_trained(base, adapter, starts)
    return adapter


def _copies(adapter: Adapter) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in adapter.parameters.items()}


def _unloaded(base: LoadedBase, missing: Iterable[str]) -> list[str]:
    """Of the names that the file had no tensor for, those whose parameter is not loaded under another name either."""
    places = dict(base.peft_model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in places.items() if name not in set(missing)}
    return [name for name in missing if id(places.get(name)) not in loaded]


def _describe(base: LoadedBase, files: AdapterFiles, name: str) -> Adapter:
    """Find what of the model is the adapter's."""
    from peft.tuners.lora import LoraLayer

    adapter = Adapter(name, files, {}, {}, [], [])
    for prefix, module in base.peft_model.named_modules():
        own = f".{name}." in f".{prefix}."
        if own:
            adapter.modules.append((prefix, module))
        for key, parameter in module._parameters.items():
            if parameter is not None and (own or key == name):
                adapter.parameters[f"{prefix}.{key}"] = parameter
                adapter.owners[f"{prefix}.{key}"] = (module._parameters, key)
        if isinstance(module, LoraLayer) and name in module.scaling:
            adapter.scalings.append(module.scaling)
    return adapter


def _remove(base: LoadedBase, name: str) -> None:
    """Take away whatever there is of an adapter, also of one that was put on in part."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base.switch.leave(name)
    candidates = [children[key] for children, key in base.places.values()] if base.shared else base.model.modules()
    for module in list(candidates):
        if isinstance(module, BaseTunerLayer):
            if name in module.active_adapters:  # or PEFT would choose another one, and warn of it
                module._active_adapter = []
            module.delete_adapter(name)
            module.delete_adapter(PLAN_NAME)
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
    base.plans.clear()


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:300] + "..."
    return text if text.endswith(".") else text + "."
