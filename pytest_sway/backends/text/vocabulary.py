"""Whether two models mean the same by a token's number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.errors import AdapterMismatchError

if TYPE_CHECKING:
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


def require_same_tokens(base: ModelSpec, ours: Any, tuned: ModelSpec, theirs: Any) -> None:
    """Raise unless every token of the base is the same one in the fine-tuned model.

    Args:
        base: What names the base.
        ours: The base's tokenizer.
        tuned: What names the fine-tuned model.
        theirs: Its tokenizer.

    Raises:
        AdapterMismatchError: Some are others.
    """
    numbers, others = ours.get_vocab(), theirs.get_vocab()
    moved = sorted((i, token) for token, i in numbers.items() if others.get(token) != i)
    if moved:
        i, token = moved[0]
        there = f"number {others[token]}" if token in others else "none"
        raise AdapterMismatchError(
            f"the fine-tuned model {tuned.base!r} cannot be compared with the base {base.base!r}:"
            f" {len(moved):,} of the base's {len(numbers):,} tokens are others in it ({token!r} is number {i} in the"
            f" base, {there} in it). Name the base that it was fine-tuned from."
        )
