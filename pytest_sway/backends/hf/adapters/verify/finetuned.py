"""Verifies that a fine-tuned model can be compared with its base, and differs from it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from pytest_sway.backends.hf.hygiene.finite import not_finite
from pytest_sway.backends.hf.loading.classes import text_parts
from pytest_sway.backends.local.verification import diverged, require_other_weights
from pytest_sway.backends.text.tokens import require_same_tokens
from pytest_sway.errors import AdapterMismatchError, SwayWarning
from pytest_sway.spec.tasks import CAUSAL, TASKS

if TYPE_CHECKING:
    from pytest_sway.backends.hf.model.base import LoadedBase

__tracebackhide__ = True


def verify_finetuned(base: LoadedBase, tuned: LoadedBase) -> None:
    """Raise unless a fine-tuned model can be compared with its base, and differs from it.

    Their architectures may differ, but a token must mean the same in both where probabilities of tokens are
    compared. The fine-tuned model may have additional tokens.

    Raises:
        AdapterMismatchError: Tokens of the base differ in the fine-tuned model, its weights equal the base's, or they
            are not finite.
    """
    import torch

    if "logprob_of" in TASKS[base.spec.task or CAUSAL].answers:
        require_same_tokens(base.spec, base.tokenizer, tuned.spec, tuned.tokenizer)
    two_ways = tuned.spec.base == base.spec.base and tuned.spec.model_kwargs != base.spec.model_kwargs
    if not two_ways:  # to load the same weights
        require_other_weights(base.spec, base.tensors(), tuned.spec, tuned.tensors(), torch.equal)
        _warn_if_equal_for_text(base, tuned)
    _require_finite(tuned)


def _warn_if_equal_for_text(base: LoadedBase, tuned: LoadedBase) -> None:
    """Warn if two multimodal models differ only in parts that take no text."""
    import torch

    parts = text_parts(base.pristine.model)
    ours, theirs = ({n: t for n, t in side.tensors().items() if n.startswith(parts)} for side in (base, tuned))
    if parts and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours):
        warnings.warn(
            f"the fine-tuned model {tuned.spec.base!r} is equal to its base {base.spec.base!r} for text, and views ask"
            " for text alone: they differ only in other parts of the model, such as a vision tower. Name one whose text"
            " model was trained, or pass images to view.model yourself.",
            SwayWarning,
            stacklevel=3,
        )


def _require_finite(tuned: LoadedBase) -> None:
    tensors = tuned.tensors()
    broken = not_finite(tensors)
    if broken:
        raise AdapterMismatchError(diverged(f"the fine-tuned model {tuned.spec.base!r}", broken, len(tensors)))
