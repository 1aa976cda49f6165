"""Messages and checks on the weights of any model, whatever computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.errors import AdapterMismatchError
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from pytest_sway.spec.model_spec import ModelSpec


__tracebackhide__ = True


def diverged(what: str, broken: Collection[str], count: int) -> str:
    """Return a message on weights that are not finite.

    Args:
        what: The owner of the weights.
        broken: The names of tensors that are not finite.
        count: The number of all tensors.
    """
    return (
        f"{what} has NaN or infinite values in {len(broken)} of its {count} tensors ({some(broken)})."
        " Its training diverged, or the file is damaged."
    )


def unplaced(unexpected: Collection[str], missing: Collection[str]) -> str:
    """Return a text on an adapter's tensors without a place and places without a tensor; empty if there are none."""
    found = []
    if unexpected:
        found.append(f"{len(unexpected)} of its tensors have no place in the base ({some(unexpected)})")
    if missing:
        found.append(f"{len(missing)} places in the base have no tensor in it ({some(missing)})")
    return " and ".join(found)


def require_other_weights(
    base: ModelSpec, ours: Mapping[str, Any], tuned: ModelSpec, theirs: Mapping[str, Any], equal: Callable[..., Any]
) -> None:
    """Raise if a fine-tuned model's weights equal its base's.

    Args:
        base: The base's spec.
        ours: The base's weights by name.
        tuned: The fine-tuned model's spec.
        theirs: The fine-tuned model's weights by name.
        equal: Returns whether two weights are equal.

    Raises:
        AdapterMismatchError: They are equal, bit for bit.
    """
    if ours.keys() == theirs.keys() and all(equal(ours[name], theirs[name]) for name in ours):
        raise AdapterMismatchError(
            f"the fine-tuned model {tuned.base!r} is equal to its base {base.base!r}, bit for bit, so a test of it"
            " would test nothing. Was it saved before it was trained?"
        )
