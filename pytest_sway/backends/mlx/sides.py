"""The sides of a loaded backend, and what stands in for the adapter's values in its other views."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.mlx.base import encoder_of
from pytest_sway.backends.mlx.engine import Engine
from pytest_sway.backends.mlx.modules import Overlay, Place, State
from pytest_sway.errors import BackendUseError

if TYPE_CHECKING:
    from pytest_sway.backends.mlx.adapters import Adapter
    from pytest_sway.backends.mlx.base import LoadedBase

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """A model, and the state that makes it what a view shows.

    Attributes:
        base: The loaded base that it is.
        state: The state to bind.
        tokenizer: What turns its texts into tokens, in mlx-lm's wrapper.
    """

    base: LoadedBase
    state: State
    tokenizer: Any

    def with_overlay(self, overlay: Overlay) -> Side:
        """The same side with values of the adapter replaced."""
        return replace(self, state=(*self.state, overlay))

    def engine(self) -> Engine:
        """Return what computes its answers, while the state is bound."""
        base = self.base
        return Engine(base.model, encoder_of(self.tokenizer), base.config, base.embedded)


def scaled(adapter: Adapter, lam: float) -> Overlay:
    """Scales that make the adapter's LoRA terms count ``lam`` times."""
    _require_lora(adapter, "as_scaled_adapter")
    return Overlay((Place(vars(layer), "scale"), layer.scale * lam) for layer in adapter.layers.values())


def null(adapter: Adapter, seed: int, init_scale: float, rank_scale: float) -> Overlay:
    """Noise in place of the adapter's LoRA matrices, each from ``N(0, init_scale**2 * rank_scale)``.

    Raises:
        ValueError: ``rank_scale`` is not positive and finite.
    """
    if rank_scale <= 0.0 or not math.isfinite(rank_scale):
        raise ValueError(f"rank_scale must be positive and finite; got {rank_scale!r}")
    _require_lora(adapter, "as_null_adapter")
    import mlx.core as mx

    places = {name: place for name, place in adapter.places.items() if not name.endswith(".m")}
    keys = mx.random.split(mx.random.key(seed % 2**64), len(places))
    scale = init_scale * math.sqrt(rank_scale)
    noise = [
        mx.random.normal(place.value.shape, scale=scale, key=key).astype(place.value.dtype)
        for key, (_, place) in zip(keys, sorted(places.items()), strict=True)
    ]
    mx.eval(noise)
    return Overlay((places[name], array) for name, array in zip(sorted(places), noise, strict=True))


def _require_lora(adapter: Adapter, what: str) -> None:
    if not adapter.layers:
        raise BackendUseError(
            f"{what} needs a LoRA adapter; {str(adapter.files.folder)!r} is a full fine-tune, whose weights take the"
            " place of the base's. Use as_finetuned()."
        )
