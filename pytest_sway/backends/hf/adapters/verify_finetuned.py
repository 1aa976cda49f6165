"""Whether a whole fine-tuned model and its base can be compared, and differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sway.backends.hf.hygiene.finite import not_finite
from pytest_sway.backends.local.verification import diverged, require_other_weights
from pytest_sway.backends.text.vocabulary import require_same_tokens
from pytest_sway.errors import AdapterMismatchError

if TYPE_CHECKING:
    from pytest_sway.backends.hf.model.base import LoadedBase

__tracebackhide__ = True


def verify_finetuned(base: LoadedBase, tuned: LoadedBase) -> None:
    """Raise unless a test of the two models can tell something.

    Their architectures may differ: what is compared is what they say of tokens, so a token has to be the same in both.
    The fine-tuned model may have more of them.

    Raises:
        AdapterMismatchError: Tokens of the base are others in the fine-tuned model, which is equal to its base, or not
            finite.
    """
    import torch

    require_same_tokens(base.spec, base.tokenizer, tuned.spec, tuned.tokenizer)
    require_other_weights(base.spec, base.tensors(), tuned.spec, tuned.tensors(), torch.equal)
    _require_finite(tuned)


def _require_finite(tuned: LoadedBase) -> None:
    tensors = tuned.tensors()
    broken = not_finite(tensors)
    if broken:
        raise AdapterMismatchError(diverged(f"the fine-tuned model {tuned.spec.base!r}", broken, len(tensors)))
