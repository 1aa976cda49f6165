"""`Adapter`: one set of PEFT weights that is on a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_sway.backends.hf.adapter_files import AdapterFiles

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

ROOT: Final = "base_model.model."
"""What PEFT puts before the names of the base's modules."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter on a base.

    Attributes:
        name: Its name within PEFT; unlike any other's, and part of none.
        files: What it was loaded from.
        parameters: Its parameters by their names in the ``PeftModel``, in the order of ``named_parameters()``.
        owners: For each of those names, the dictionary that holds the parameter, and its key there.
        scalings: The dictionaries of its LoRA layers that hold its scaling, a factor without unit, under its name.
        modules: The modules that came with it, by their names in the ``PeftModel``.
    """

    name: str
    files: AdapterFiles
    parameters: dict[str, Any]
    owners: dict[str, tuple[dict[str, Any], str]]
    scalings: list[dict[str, float]]
    modules: list[tuple[str, Any]]


def public_name(name: str, adapter: str) -> str:
    """Return a parameter's or module's name without what PEFT and we put into it."""
    return name.removeprefix(ROOT).replace(f".{adapter}", "")


def some(names: Iterable[str], limit: int = 3) -> str:
    """Return the first of some names, for an error that has no room for all."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
