"""Check that two models give their tokens the same ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.errors import AdapterMismatchError

if TYPE_CHECKING:
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


def require_same_tokens(base: ModelSpec, ours: Any, tuned: ModelSpec, theirs: Any) -> None:
    """Raise unless every token of the base has the same id in the fine-tuned model.

    Args:
        base: The base's spec.
        ours: The base's tokenizer.
        tuned: The fine-tuned model's spec.
        theirs: The fine-tuned model's tokenizer.

    Raises:
        AdapterMismatchError: Some tokens have other ids.
    """
    numbers, others = ours.get_vocab(), theirs.get_vocab()
    moved = sorted((i, token) for token, i in numbers.items() if others.get(token) != i)
    if moved:
        i, token = moved[0]
        there = f"id {others[token]}" if token in others else "none"
        raise AdapterMismatchError(
            f"the fine-tuned model {tuned.base!r} cannot be compared with the base {base.base!r}:"
            f" {len(moved):,} of the base's {len(numbers):,} tokens have other ids in it ({token!r} has id {i} in the"
            f" base, {there} in it). Name the base that it was fine-tuned from."
        )
