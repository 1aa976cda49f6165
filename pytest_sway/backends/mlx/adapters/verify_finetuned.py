"""Check that a whole fine-tuned model and its base can be compared, and differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sway.backends.local.verification import require_other_weights
from pytest_sway.backends.mlx.model.trees import arrays_of
from pytest_sway.backends.text.vocabulary import require_same_tokens

if TYPE_CHECKING:
    from pytest_sway.backends.mlx.model.base import LoadedBase

__tracebackhide__ = True


def verify_finetuned(base: LoadedBase, tuned: LoadedBase) -> None:
    """Raise unless the two models have the same tokens and different weights.

    Raises:
        AdapterMismatchError: Tokens have other ids in the fine-tuned model, or it is equal to its base.
    """
    import mlx.core as mx

    require_same_tokens(base.spec, base.encoder, tuned.spec, tuned.encoder)
    require_other_weights(base.spec, arrays_of(base.model), tuned.spec, arrays_of(tuned.model), mx.array_equal)
