"""What was found out about a model by trying, once for all of its trees."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Trials:
    """What trials of a model have shown; ``None`` for what was not tried yet.

    Attributes:
        divides: Whether the model divides into body and head.
        body: The name of the module that is its body, if it divides.
        output_class: The class of what the body returns.
        longest_packed: The most tokens that a sequence may have to go through the model in a row with others.
        caches: Whether continuing from a key-value cache gives what one pass over everything gives.
        looks_ahead: Whether a token is known to change what is computed for those before it. That is not tried: a few
            tokens may not show it.
        continues: By the lengths of prompts, whether these go on together from a key-value cache as they are scored.
    """

    divides: bool | None = None
    body: str = ""
    output_class: type | None = None
    longest_packed: int | None = None
    caches: bool | None = None
    looks_ahead: bool = False
    continues: dict[tuple[int, ...], bool] = field(default_factory=dict)
