"""Whether a model answers as a causal language model does: with numbers, and with none that later tokens change."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.hygiene.finite import has_nan, not_finite
from pytest_sway.backends.hf.loading.model import why_not_run
from pytest_sway.backends.hf.scoring.body_and_head import agree, trial_tokens
from pytest_sway.backends.libraries.process import no_warnings
from pytest_sway.backends.local.verification import diverged
from pytest_sway.errors import SpecError, WeightsError

if TYPE_CHECKING:
    from pytest_sway.backends.hf.model.base import LoadedBase

__tracebackhide__ = True

_SAME: Final = 2
"""How many tokens the two texts of a trial begin with in common."""


def verify_base(base: LoadedBase, role: str = "base") -> None:
    """Raise unless a base computes numbers, and computes them from left to right; tried once, in one small pass.

    A model whose trees are each loaded anew is tried when it first computes, since a tree for that would double the
    load.

    Args:
        base: The base, or a whole fine-tuned model.
        role: What the spec calls it.

    Raises:
        SpecError: What it computes for a token depends on those after it, or it does not run by a field of its config.
        WeightsError: It computes NaN, and has weights that are no numbers.
    """
    if base.is_tried:
        return
    if not base.pristine.shares:
        base.side.at_first(partial(verify_model, base, role=role))
        return
    with base.side.engine() as engine:
        verify_model(base, engine.forward.model, role)


def verify_model(base: LoadedBase, model: Any, role: str = "base") -> None:
    """Do as `verify_base` does with a tree of a base, or of an adapter on it."""
    import torch

    if base.is_tried:
        return
    why = None
    with no_warnings(), torch.inference_mode():
        first = trial_tokens(model)
        texts = [first, (*first[:_SAME], *first[: len(first) - _SAME])]
        try:
            logits = model(input_ids=torch.tensor(texts, device=model.device), use_cache=False).logits
        except Exception as error:  # a model of an unforeseen shape can fail in any way
            logits, why = None, why_not_run(base.spec, error)
    if why is not None:
        raise why
    if logits is None:  # the first score will say how
        pass
    elif has_nan(logits):
        tensors = base.tensors()
        broken = not_finite(tensors)
        if broken:
            raise WeightsError(diverged(f"the {role} {base.spec.base!r}", broken, len(tensors)))
    elif not agree(logits[0, :_SAME], logits[1, :_SAME]):
        raise SpecError(
            f"the {role} {base.spec.base!r} is no causal language model: in its {type(model).__name__}, later tokens"
            " change what is computed for those before them, as in BERT and other encoders. Name a model that was"
            " trained to predict the next token."
        )
    base.is_tried = True
