"""What verification says of any model's weights, whatever computes them, and whether two models differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.errors import AdapterMismatchError
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from pytest_sway.spec.model_spec import ModelSpec


__tracebackhide__ = True


def diverged(what: str, broken: Collection[str], count: int) -> str:
    """Return the sentence that weights are not finite.

    Args:
        what: Whose.
        broken: The names of the tensors that are not.
        count: How many tensors there are.
    """
    return (
        f"{what} has NaN or infinite values in {len(broken)} of its {count} tensors ({some(broken)})."
        " Its training diverged, or the file is damaged."
    )


def unplaced(unexpected: Collection[str], missing: Collection[str]) -> str:
    """Return in words which tensors of an adapter have no place, and which places no tensor; empty if none are."""
    found = []
    if unexpected:
        found.append(f"{len(unexpected)} of its tensors have no place in the base ({some(unexpected)})")
    if missing:
        found.append(f"{len(missing)} places in the base have no tensor in it ({some(missing)})")
    return " and ".join(found)


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
