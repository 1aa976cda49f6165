"""`BoundModel`: the model, tokenizer and engine of a view."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.mlx.model.base import encoder_of
from pytest_sway.backends.mlx.model.engine import Engine
from pytest_sway.backends.mlx.model.trees import tree_of

if TYPE_CHECKING:
    from pytest_sway.backends.mlx.model.base import LoadedBase

__tracebackhide__ = True


@dataclass(frozen=True, eq=False)
class BoundModel:
    """One side of a backend.

    Attributes:
        base: The loaded base that the model is made from.
        model: A pristine tree: the base's, the adapter's, or one made for this side.
        tokenizer: The tokenizer, in mlx-lm's wrapper.
    """

    base: LoadedBase
    model: Any
    tokenizer: Any

    def engine(self) -> Engine:
        """Return the engine that computes the side's answers."""
        base = self.base
        return Engine(self._running, encoder_of(self.tokenizer), base.config, base.embedded, base.exact_length)

    def close(self) -> None:
        """Do nothing: the trees go with this object."""

    @cached_property
    def _running(self) -> Any:
        """The tree that computes, apart from the pristine one: modules of some models store things when they run."""
        return tree_of(self.model)
