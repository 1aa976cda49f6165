"""`Adapter`: one set of PEFT weights on a base."""

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
    """A verified adapter on its base.

    Attributes:
        files: The files that it was loaded from.
        pristine: Makes trees with the adapter.
        own: The tensors that the adapter does not share with the base, by their names in the ``PeftModel``.
        scaling: The largest LoRA scaling; 1 if there is none.
        memory: Tensors that together hold exactly ``own``: the same tensors, or larger ones that they are parts of.
    """

    files: AdapterFiles
    pristine: Pristine | OnSkeleton
    own: dict[str, Any]
    scaling: float
    memory: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its own tensors."""
        return measured(self.memory)

    @property
    def watches(self) -> Watches:
        """Watches over its memory in all trees."""
        return self.pristine.watches
