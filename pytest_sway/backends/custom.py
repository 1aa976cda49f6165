"""Backends of kind ``custom``: a class of the user's own, named by ``entry_point="package.module:Class"``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pytest_sway.backends import require_differential
from pytest_sway.errors import SpecError

if TYPE_CHECKING:
    from pytest_sway.scoring import DifferentialBackend
    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


def import_class(spec: ModelSpec) -> Any:
    """Return what the spec's ``entry_point`` names.

    Raises:
        SpecError: The module cannot be found, or has no such attribute.
    """
    module_name, _, path = (spec.entry_point or "").partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise SpecError(
            f"entry_point {spec.entry_point!r}: the module {module_name!r} cannot be imported ({error})."
            " Check its name, and that it can be imported where pytest runs."
        ) from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise SpecError(f"entry_point {spec.entry_point!r}: {module_name!r} has no {path!r}.") from error
    return found


def build_custom(spec: ModelSpec) -> DifferentialBackend:
    """Call the spec's class as ``Class(base_spec=spec, adapter_path=spec.adapter)``, as dlm-sway does.

    Raises:
        SpecError: The class cannot be imported.
        BackendLoadError: What it makes is no differential backend.
    """
    backend = import_class(spec)(base_spec=spec, adapter_path=spec.adapter)
    return require_differential(backend, f"entry_point {spec.entry_point!r}")
