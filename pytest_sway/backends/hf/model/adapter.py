"""`Adapter`: one set of PEFT weights, on a model of its own that shares the base's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.hygiene.weights_watch import measured

if TYPE_CHECKING:
    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.pristine import Pristine, Watches
    from pytest_sway.backends.hf.model.skeletons import OnSkeleton

__tracebackhide__ = True


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter that was put on its base, and verified.

    Attributes:
        files: What it was loaded from.
        pristine: What makes trees with it.
        own: The tensors that are not the base's, or no longer, by their names in the ``PeftModel``.
        scaling: The largest factor that the product of two LoRA matrices is multiplied by; 1 where there are none.
        memory: Tensors that together hold just those: themselves, or what they are parts of.
    """

    files: AdapterFiles
    pristine: Pristine | OnSkeleton
    own: dict[str, Any]
    scaling: float
    memory: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """What its own tensors take."""
        return measured(self.memory)

    @property
    def watches(self) -> Watches:
        """Watches over its memory, wherever that is used."""
        return self.pristine.watches
