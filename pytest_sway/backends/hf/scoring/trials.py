"""`Trials`: what trials have shown about a model, once for all of its trees, and for later runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

__tracebackhide__ = True


class Memory(Protocol):
    """What remembers the results for later runs."""

    def recall(self, trials: Trials) -> None:
        """Take over the results of earlier runs, at the first call."""

    def remember(self, trials: Trials) -> None:
        """Keep new results for later runs."""


@dataclass(slots=True, eq=False)
class Trials:
    """Results of trials of a model; ``None`` for a trial that was not made yet.

    Attributes:
        divides: Whether the model can be split into body and head.
        body: The name of the body's module.
        output_class: The class of the body's output.
        divides_words: Whether the logits of some words are the same without the others'.
        longest_packed: The most tokens of a sequence that can be packed into a row with others.
        caches: Whether continuing from a key-value cache gives the same as one pass.
        pads: Whether a text that is padded on the right is read as it is alone.
        looks_ahead: Whether a token is known to change what is computed for earlier ones. No trial shows this: a few
            tokens may hide it.
        continues: Whether prompts of some lengths continue together from a key-value cache as they are scored, by these
            lengths.
        memory: Remembers the results for later runs; ``None`` if nothing does.
    """

    divides: bool | None = None
    body: str = ""
    output_class: type | None = None
    divides_words: bool | None = None
    longest_packed: int | None = None
    caches: bool | None = None
    pads: bool | None = None
    looks_ahead: bool = False
    continues: dict[tuple[int, ...], bool] = field(default_factory=dict)
    memory: Memory | None = None

    def recall(self) -> None:
        """Take over the results of earlier runs, if that was not done yet."""
        if self.memory is not None:
            self.memory.recall(self)

    def remember(self) -> None:
        """Remember new results for later runs."""
        if self.memory is not None:
            self.memory.remember(self)

    def failed(self) -> None:
        """Note that a trial raised an error. It may not come again, so later runs make their own trials."""
        self.memory = None
