"""`Adapter`: one set of PEFT weights, on a model of its own that shares the base's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.memory import measured
from pytest_sway.backends.hf.trees import modules_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.pristine import Pristine, Watches
    from pytest_sway.backends.hf.skeletons import OnSkeleton

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

ROOT: Final = "base_model.model."
"""What PEFT puts before the names of the base's modules."""

NAME: Final = "default"
"""PEFT's own name for an adapter that is the only one."""

_LONGEST_NAME: Final = 150


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


def adapter_parameters(peft_model: Any) -> dict[str, Any]:
    """Return the parameters that came with the adapter, by name, in the order of ``named_parameters()``."""
    return {name: parameter for name, parameter in peft_model.named_parameters() if is_adapters(name)}


def is_adapters(name: str) -> bool:
    """Whether a name in the ``PeftModel`` is that of something that came with the adapter."""
    return f".{NAME}." in f".{name}."


def scalings_of(peft_model: Any) -> list[dict[str, float]]:
    """Return the dictionaries of the LoRA layers that hold the adapter's scaling, a factor without unit."""
    from peft.tuners.lora import LoraLayer

    layers = (module for _, module in modules_of(peft_model) if isinstance(module, LoraLayer))
    return [layer.scaling for layer in layers if NAME in layer.scaling]


def largest_scaling(peft_model: Any) -> float:
    """Return the largest factor that the product of two LoRA matrices is multiplied by; 1 where there are none."""
    return max((abs(scaling[NAME]) for scaling in scalings_of(peft_model)), default=1.0)


def inner_model(peft_model: Any) -> Any:
    """Return the Hugging Face model inside of a ``PeftModel``, with PEFT's layers in it; any other model as it is."""
    return peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model


def public_name(name: str) -> str:
    """Return a parameter's or module's name without what PEFT puts into it."""
    return without_name(name.removeprefix(ROOT))


def without_name(name: str) -> str:
    """Return a parameter's or module's name without PEFT's name for the adapter."""
    return name.replace(f".{NAME}", "")


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


def some(names: Iterable[str], limit: int = 3) -> str:
    """Return the first of some names, for an error that has no room for all, or for one without end."""
    names = sorted(names)
    few = (name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in names[:limit])
    return ", ".join(few) + (", ..." if len(names) > limit else "")
