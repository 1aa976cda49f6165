"""Models whose rotary embeddings depend on the longest text in a pass: which texts may be in one pass.

Rope of the kind ``longrope`` has one set of frequencies for texts up to a length, and one for longer texts. Rope
of the kind ``dynamic`` has frequencies of its own for each length beyond one, and keeps those of the longest text that
it has met (transformers, ``modeling_rope_utils.dynamic_rope_update``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

__tracebackhide__ = True


class RopeRegimes:
    """What rotary embeddings a model uses for a text of some length.

    Args:
        config: The model's configuration.
        virtual_tokens: How many positions an adapter puts before each text.
    """

    def __init__(self, config: Any, virtual_tokens: int = 0) -> None:
        self._virtual = virtual_tokens
        text = config.get_text_config()
        self._long = {limit for kind, limit in _changes_of_rope(text) if kind == "longrope"}
        self._dynamic = {limit for kind, limit in _changes_of_rope(text) if "dynamic" in kind}

    @property
    def one_for_all(self) -> bool:
        """Whether texts of all lengths may be in one pass."""
        return not (self._long or self._dynamic)

    def of(self, tokens: int) -> Hashable:
        """Return a key that is equal for texts that may be in one pass; 0 where the model's first frequencies are used.

        Args:
            tokens: The length of a text.
        """
        positions = tokens + self._virtual
        beyond = tuple(sorted(limit for limit in self._long if positions > limit))
        grown = positions if any(positions > limit for limit in self._dynamic) else 0
        return (beyond, grown) if beyond or grown else 0

    def leaves_a_trace(self, tokens: int) -> bool:
        """Whether a model that has computed a text of this length computes others differently afterwards."""
        return any(tokens + self._virtual > limit for limit in self._dynamic)


def _changes_of_rope(config: Any) -> Iterator[tuple[str, int]]:
    """The kinds of rotary embeddings that change with the length, each with the length beyond which it does."""
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
