"""`Adapter`: one set of PEFT weights, on a model of its own that shares the base's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.checkpoints.peft_adapter import NAME

if TYPE_CHECKING:
    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.pristine import Pristine
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


def without_name(name: str) -> str:
    """Return a parameter's or module's name without PEFT's name for the adapter."""
    return name.replace(f".{NAME}", "")
