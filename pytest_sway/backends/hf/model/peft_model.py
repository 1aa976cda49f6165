"""Reads the parts of a ``PeftModel``: adapter parameters, scalings and the Hugging Face model inside."""

from __future__ import annotations

from typing import Any

from pytest_sway.backends.checkpoints.peft_adapter import NAME, is_adapters
from pytest_sway.backends.hf.sharing.trees import modules_of

__tracebackhide__ = True


def adapter_parameters(peft_model: Any) -> dict[str, Any]:
    """Return the adapter's parameters by name, in the order of ``named_parameters()``."""
    return {name: parameter for name, parameter in peft_model.named_parameters() if is_adapters(name)}


def scalings_of(peft_model: Any) -> list[dict[str, float]]:
    """Return the ``scaling`` dictionaries of the LoRA layers with the adapter; the factors have no unit."""
    from peft.tuners.lora import LoraLayer

    layers = (module for _, module in modules_of(peft_model) if isinstance(module, LoraLayer))
    return [layer.scaling for layer in layers if NAME in layer.scaling]


def largest_scaling(peft_model: Any) -> float:
    """Return the largest LoRA scaling; 1 if there is none."""
    return max((abs(scaling[NAME]) for scaling in scalings_of(peft_model)), default=1.0)


def inner_model(peft_model: Any) -> Any:
    """Return the Hugging Face model inside a ``PeftModel``, with PEFT's layers in it; any other model as it is."""
    return peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model
