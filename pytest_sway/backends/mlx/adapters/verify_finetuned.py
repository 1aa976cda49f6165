"""Whether a whole fine-tuned model and its base can be compared, and differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sway.backends.mlx.model.trees import arrays_of
from pytest_sway.backends.text.vocabulary import require_same_tokens
from pytest_sway.errors import AdapterMismatchError

if TYPE_CHECKING:
    from pytest_sway.backends.mlx.model.base import LoadedBase

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


def verify_finetuned(base: LoadedBase, tuned: LoadedBase) -> None:
    """Raise unless a test of the two models can tell something.

    Raises:
        AdapterMismatchError: Tokens of the base are others in the fine-tuned model, or it is equal to its base.
    """
    import mlx.core as mx

    require_same_tokens(base.spec, base.encoder, tuned.spec, tuned.encoder)
    ours, theirs = arrays_of(base.model), arrays_of(tuned.model)
    if ours.keys() == theirs.keys() and all(mx.array_equal(ours[name], theirs[name]).item() for name in ours):
        raise AdapterMismatchError(
            f"the fine-tuned model {tuned.spec.base!r} is equal to its base {base.spec.base!r}, bit by bit, so a test"
            " of it would test nothing. Was it saved before it was trained?"
        )
