"""Which texts must be computed alone, since what else is in a pass would change their numbers.

Quantized models are told by their configs. Others have rotary embeddings that depend on the longest text of a pass:
``longrope`` has one set of frequencies for texts up to a length, and another for longer texts. ``dynamic`` has
frequencies of its own for each length beyond a limit, and keeps those of the longest text so far (transformers,
``modeling_rope_utils.dynamic_rope_update``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

__tracebackhide__ = True


class RopeRegimes:
    """The rotary embeddings that a model uses for texts of different lengths.

    Args:
        config: The model's configuration.
        virtual_tokens: Positions that an adapter puts before each text.
    """

    def __init__(self, config: Any, virtual_tokens: int = 0) -> None:
        self._virtual = virtual_tokens
        text = config.get_text_config()
        self._long = {limit for kind, limit in _changes_of_rope(text) if kind == "longrope"}
        self._dynamic = {limit for kind, limit in _changes_of_rope(text) if "dynamic" in kind}

    @property
    def one_for_all(self) -> bool:
        """Whether texts of all lengths may share a pass."""
        return not (self._long or self._dynamic)

    def of(self, tokens: int) -> Hashable:
        """Return a key that is equal for texts that may share a pass; 0 for the model's initial frequencies.

        Args:
            tokens: The length of a text.
        """
        positions = tokens + self._virtual
        beyond = tuple(sorted(limit for limit in self._long if positions > limit))
        grown = positions if any(positions > limit for limit in self._dynamic) else 0
        return (beyond, grown) if beyond or grown else 0

    def leaves_a_trace(self, tokens: int) -> bool:
        """Return whether a text of this length changes how the model computes the texts after it."""
        return any(tokens + self._virtual > limit for limit in self._dynamic)


def _changes_of_rope(config: Any) -> Iterator[tuple[str, int]]:
    """Yield the kinds of rotary embeddings that depend on the length, each with the length at which it changes."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, Mapping):
        return
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    for rope in nested or [parameters]:
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind == "longrope":
            own = rope.get("original_max_position_embeddings")
            own = own or getattr(config, "original_max_position_embeddings", None)
            yield kind, int(own or config.max_position_embeddings)
        elif "dynamic" in kind:
            yield kind, int(config.max_position_embeddings)


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
