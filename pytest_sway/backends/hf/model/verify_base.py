"""Verifies that what a model computes are numbers, and that those of a causal one do not depend on later tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.hub_files import config_of
from pytest_sway.backends.hf.hygiene.finite import has_nan, not_finite
from pytest_sway.backends.hf.loading.classes import is_multimodal
from pytest_sway.backends.hf.loading.model import why_not_run
from pytest_sway.backends.hf.loading.model_kwargs import lacking_kernels
from pytest_sway.backends.hf.loading.tasks import needs_another_text, numbers, other_task
from pytest_sway.backends.hf.scoring.body_and_head import agree, trial_tokens
from pytest_sway.backends.libraries.culprits import said
from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.backends.libraries.process import no_warnings
from pytest_sway.backends.local.verification import diverged
from pytest_sway.errors import SpecError, SwayError, WeightsError
from pytest_sway.spec.tasks import is_causal

if TYPE_CHECKING:
    from pytest_sway.backends.hf.model.base import LoadedBase

__tracebackhide__ = True

_SAME: Final = 2
"""Tokens that the two texts of a trial have in common at their start."""


def verify_base(base: LoadedBase, role: str = "base") -> None:
    """Raise unless a base computes numbers, and a causal one numbers that later tokens do not change.

    One small pass tries this once per base.

    If each tree is loaded anew, the trial waits until the model first computes: a tree for the trial alone would double
    the load time.

    Args:
        base: The base or the fine-tuned model.
        role: The model's role in errors.

    Raises:
        SpecError: Later tokens change the logits of earlier ones, a field of the config keeps the model from running,
            or a multimodal model, or one for embeddings, does not run with one text alone.
        BackendNotAvailableError: Its quantization computes with a package that is not installed.
        WeightsError: The model computes NaN, and its weights contain NaN or infinite values.
    """
    if base.is_tried:
        return
    if not base.pristine.shares:
        base.side.at_first(partial(verify_model, base, role=role))
        return
    with base.side.engine() as engine:
        verify_model(base, engine.forward.model, role)


def verify_model(base: LoadedBase, model: Any, role: str = "base") -> None:
    """Do what `verify_base` does, with a given tree of the base or of an adapter on it."""
    import torch

    if base.is_tried:
        return
    causal = is_causal(base.spec.task)
    why: SwayError | None = None
    with no_warnings(), torch.inference_mode():
        first = trial_tokens(model)
        texts = [first, (*first[:_SAME], *first[: len(first) - _SAME])]
        try:
            logits = (
                model(input_ids=torch.tensor(texts, device=model.device), use_cache=False).logits
                if causal
                else numbers(model, first)
            )
        except Exception as error:  # an unknown architecture may raise anything
            logits = None
            why = _why_not_run(base, f"the {role} {base.spec.base!r}", model, error)
    if why is not None:
        raise why
    if logits is None:  # the first score will raise the error
        pass
    elif has_nan(logits):
        tensors = base.tensors()
        broken = not_finite(tensors)
        if broken:
            raise WeightsError(diverged(f"the {role} {base.spec.base!r}", broken, len(tensors)))
    elif causal and not agree(logits[0, :_SAME], logits[1, :_SAME]):
        other = other_task(base.spec, config_of(base.spec))
        raise SpecError(
            f"the {role} {base.spec.base!r} is not a causal language model: in its {type(model).__name__}, later"
            " tokens change the logits of earlier ones, as in BERT and other encoders. Name a model that was trained to"
            f" predict the next token{f', or change the task: {other}' if other else ''}."
        )
    base.is_tried = True


def _why_not_run(base: LoadedBase, what: str, model: Any, error: Exception) -> SwayError | None:
    """Return the error for a model that does not run; ``None`` where the cause is not known."""
    lacking = lacking_kernels(base.spec, error)
    if lacking is not None:
        return lacking
    embeds = base.spec.task == "embeddings" and not out_of_memory(error)
    if embeds and needs_another_text(model, trial_tokens(model)):
        return _of_two_texts(what, model)
    why = why_not_run(base.spec, error)
    return _not_of_text(what, model, error) if why is None and is_multimodal(model) else why


def _not_of_text(what: str, model: Any, error: Exception) -> SpecError:
    return SpecError(
        f"{what} is of the class {type(model).__name__}, which does not compute logits for text alone: {said(error)}"
        " Name a language model, or a multimodal one that takes text without images or sounds."
    )


def _of_two_texts(what: str, model: Any) -> SpecError:
    return SpecError(
        f"{what} is of the class {type(model).__name__}, whose decoder must be given a text of its own, so there is no"
        " embedding of one text. Name an encoder, or a T5, mT5 or UMT5, whose encoder alone is loaded."
    )
