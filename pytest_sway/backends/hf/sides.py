"""The two sides of a loaded backend, and what stands in for the adapter's values in its other views."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.adapter_kinds import PROMPT_TYPES
from pytest_sway.backends.hf.state import BASE_STATE, Overlay, State
from pytest_sway.errors import BackendUseError

if TYPE_CHECKING:
    from pytest_sway.backends.hf.adapter import Adapter
    from pytest_sway.backends.hf.base import LoadedBase
    from pytest_sway.backends.hf.recall import Recall

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """A model, and the state that makes it what a view shows.

    Attributes:
        base: The loaded base that it is.
        state: The state to bind.
        tokenizer: What turns its texts into tokens.
        runner: What computes: the model inside, where that does the same as the ``PeftModel`` around it.
        raw: What is given to other libraries.
    """

    base: LoadedBase
    state: State
    tokenizer: Any
    runner: Any
    raw: Any

    @property
    def recall(self) -> Recall | None:
        """What the base has answered before, where this side is the base as it is."""
        return None if self.state.enabled else self.base.recall

    def with_overlay(self, overlay: Overlay) -> Side:
        """The same side with values of the adapter replaced."""
        return replace(self, state=replace(self.state, overlay=overlay))


def plain_side(base: LoadedBase, tokenizer: Any = None) -> Side:
    """A base as it is; the tokenizer is its own, unless another is given."""
    return Side(base, BASE_STATE, tokenizer or base.tokenizer, base.model, base.model)


def base_side(base: LoadedBase, adapter: Adapter, tokenizer: Any) -> Side:
    """The base as it is, on a model that has an adapter on it."""
    if adapter.files.peft_type in PROMPT_TYPES:
        return plain_side(base, tokenizer)
    return Side(base, State(adapter.name), tokenizer, base.model, base.peft_model)


def tuned_side(base: LoadedBase, adapter: Adapter, tokenizer: Any) -> Side:
    """The base with an adapter."""
    runner = base.model if adapter.files.through_inner_model else base.peft_model
    return Side(base, State(adapter.name, enabled=True), tokenizer, runner, base.peft_model)


def scaled(adapter: Adapter, lam: float) -> Overlay:
    """Scalings that make the adapter's LoRA terms count ``lam`` times."""
    _require_lora(adapter, "as_scaled_adapter")
    return Overlay([(scaling, adapter.name, scaling[adapter.name] * lam) for scaling in adapter.scalings])


def null(adapter: Adapter, seed: int, init_scale: float, rank_scale: float) -> Overlay:
    """Noise in place of the adapter's LoRA matrices: dlm-sway's, number by number.

    Each is drawn from ``N(0, init_scale**2 * rank_scale)``. A product of rank r has a variance in proportion to r, so
    scaling both factors' deviation by ``sqrt(rank_scale)`` stands for an adapter of rank ``r * rank_scale``. The
    matrices of embeddings, which dlm-sway leaves as they are, come after all others.

    Raises:
        ValueError: ``rank_scale`` is not positive and finite.
    """
    if rank_scale <= 0.0 or not math.isfinite(rank_scale):
        raise ValueError(f"rank_scale must be positive and finite; got {rank_scale!r}")
    _require_lora(adapter, "as_null_adapter")
    import torch

    scale = init_scale * math.sqrt(rank_scale)
    generator = torch.Generator(device="cpu").manual_seed(int(seed))
    names = [name for name in adapter.parameters if ".lora_A." in name or ".lora_B." in name]
    names += [name for name in adapter.parameters if ".lora_embedding_" in name]
    stand_ins = []
    for name in names:
        parameter = adapter.parameters[name]
        noise = torch.randn(*parameter.shape, generator=generator, dtype=torch.float32)
        noise = noise.to(dtype=parameter.dtype, device=parameter.device) * scale
        container, key = adapter.owners[name]
        stand_ins.append((container, key, torch.nn.Parameter(noise, requires_grad=False)))
    return Overlay(stand_ins)


def _require_lora(adapter: Adapter, what: str) -> None:
    if adapter.files.peft_type != "LORA" or not adapter.files.restorable:
        raise BackendUseError(
            f"{what} needs a LoRA adapter that only adds to its base; {str(adapter.files.folder)!r} is of the type"
            f" {adapter.files.peft_type} or changes the base's own weights."
        )
