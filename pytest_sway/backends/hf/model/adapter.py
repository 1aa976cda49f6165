"""`Adapter`: one set of PEFT weights, on a model of its own that shares the base's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.hygiene.weights_watch import measured
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.pristine import Pristine, Watches
    from pytest_sway.backends.hf.model.skeletons import OnSkeleton

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter that was put on its base, and verified.

    Attributes:
        files: What it was loaded from.
        pristine: What makes trees with it.
        own: The tensors that are not the base's, or no longer, by their names in the ``PeftModel``.
        scaling: The largest factor that the product of two LoRA matrices is multiplied by; 1 where there are none.
    """

    files: AdapterFiles
    pristine: Pristine | OnSkeleton
    own: dict[str, Any]
    scaling: float

    @property
    def nbytes(self) -> int:
        """What its own tensors take."""
        return measured(self.own.values())

    @property
    def watches(self) -> Watches:
        """Watches over its memory, wherever that is used."""
        return self.pristine.watches


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
