"""`BoundModel`: what a view shows of a loaded backend, and what computes its answers."""

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
    """What a view shows.

    Attributes:
        base: The loaded base that it is made from.
        model: A pristine tree: the base's, the adapter's, or one that was made for this side.
        tokenizer: What turns its texts into tokens, in mlx-lm's wrapper.
    """

    base: LoadedBase
    model: Any
    tokenizer: Any

    def engine(self) -> Engine:
        """Return what computes its answers."""
        return Engine(self._running, encoder_of(self.tokenizer), self.base.config, self.base.embedded)

    def close(self) -> None:
        """Let go of nothing: what it refers to goes with it, since it keeps no tree for another call."""

    @cached_property
    def _running(self) -> Any:
        """The tree that computes: the modules of some models keep things when they run."""
        return tree_of(self.model)
