"""Whether a whole fine-tuned model and its base can be compared, and differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.hygiene.finite import not_finite
from pytest_sway.backends.hf.model.adapter import diverged
from pytest_sway.backends.text.vocabulary import require_same_tokens
from pytest_sway.errors import AdapterMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


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


def require_other_weights(
    base: ModelSpec, ours: Mapping[str, Any], tuned: ModelSpec, theirs: Mapping[str, Any], equal: Callable[..., Any]
) -> None:
    """Raise if the weights of a fine-tuned model are its base's.

    Args:
        base: What names the base.
        ours: The base's weights by name.
        tuned: What names the fine-tuned model.
        theirs: Its weights by name.
        equal: Whether two of them are equal.

    Raises:
        AdapterMismatchError: They are, bit by bit.
    """
    if ours.keys() == theirs.keys() and all(equal(ours[name], theirs[name]) for name in ours):
        raise AdapterMismatchError(
            f"the fine-tuned model {tuned.base!r} is equal to its base {base.base!r}, bit by bit, so a test of it"
            " would test nothing. Was it saved before it was trained?"
        )


def _require_finite(tuned: LoadedBase) -> None:
    tensors = tuned.tensors()
    broken = not_finite(tensors)
    if broken:
        raise AdapterMismatchError(diverged(f"the fine-tuned model {tuned.spec.base!r}", broken, len(tensors)))
