"""`RopeRegimes`: which texts may share a pass if rotary embeddings depend on its longest text.

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
