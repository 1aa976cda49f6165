"""Tells which quantized models compute a text in another way beside other texts, from their configs alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__tracebackhide__ = True


def mixes_texts(config: Any) -> bool:
    """Return whether a text's numbers depend on the other texts in its pass.

    LLM.int8 computes a column of a pass in another way if any number in it, of any text, is an outlier. Other formats
    may round all activations of a pass on one scale, which its largest number tells.

    Args:
        config: The model's config.
    """
    quantization: Any = getattr(config, "quantization_config", None)
    if getattr(quantization, "load_in_8bit", False):
        return bool(quantization.llm_int8_threshold > 0)
    return any(map(_has_one_scale, _torchao(getattr(quantization, "quant_type", None)))) or any(
        getattr(each, "dynamic", False) is True and getattr(each, "strategy", None) == "tensor"
        for each in _compressed(quantization)
    )


def _torchao(kind: Any) -> Iterator[Any]:
    """Yield torchao's configs: one, or those of single modules."""
    by_name = getattr(kind, "fqn_to_config", None) or getattr(kind, "module_fqn_to_config", None)
    if isinstance(by_name, dict):
        for each in by_name.values():
            yield from _torchao(each)
    elif kind is not None:
        yield kind


def _has_one_scale(kind: Any) -> bool:
    """Whether a config of torchao's has one scale for all activations of a pass, computed in it."""
    name = type(kind).__name__
    if "DynamicActivation" not in name or not hasattr(kind, "granularity"):
        return bool(getattr(kind, "use_dynamic_per_tensor_scale", False))  # of NVFP4
    granularity = kind.granularity
    if isinstance(granularity, list | tuple):
        granularity = granularity[0]  # of the activations; the other one is of the weights
    if granularity is None:
        return name.startswith("Float8")  # torchao's defaults: this per tensor, int8 per row
    return type(granularity).__name__ == "PerTensor"


def _compressed(quantization: Any) -> Iterator[Any]:
    """Yield how compressed-tensors quantizes the activations of each group of layers."""
    groups = getattr(getattr(quantization, "quantization_config", None), "config_groups", None)
    for scheme in groups.values() if isinstance(groups, dict) else ():
        yield getattr(scheme, "input_activations", None)
