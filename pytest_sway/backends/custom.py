"""Backends of kind ``custom``: a class of your own, named by ``entry_point="package.module:Class"``."""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.checkpoints.plan import Plan
from pytest_sway.backends.contract import Build, require_differential
from pytest_sway.errors import BackendLoadError, SpecError, ends_run
from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.protocols import DifferentialBackend
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


def import_class(spec: ModelSpec) -> Callable[..., Any]:
    """Return what the spec's ``entry_point`` names: a class, or a function that makes a backend.

    Raises:
        SpecError: The module or its attribute does not exist, or cannot be called as `CustomBuilder` does.
        BackendLoadError: The import of the module raised an error.
    """
    module_name, _, path = (spec.entry_point or "").partition(":")
    found: Any = _module(spec, module_name)
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            close = difflib.get_close_matches(name, dir(found), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise SpecError(f"entry_point {spec.entry_point!r}: {module_name!r} has no {path!r}.{hint}") from error
    if not callable(found):
        raise SpecError(
            f"entry_point {spec.entry_point!r} is an object of type {type(found).__name__}, not a class."
            " Name the class or the function that makes the backend."
        )
    _require_signature(spec, found)
    return found  # type: ignore[no-any-return] # it is callable


class CustomBuilder(Build):
    """Builds backends of kind ``custom``."""

    def check(self, spec: ModelSpec) -> Plan:
        """Import the class that ``spec`` names; see `import_class`."""
        return replace(Plan.of(spec), read=import_class(spec))

    def build(self, plan: Plan) -> DifferentialBackend:
        """Call the spec's class as ``Class(base_spec=spec, adapter_path=spec.adapter)``, as dlm-sway does.

        It only requires the methods that open a view. It opens none, since the class may take long for that: if a view
        lacks a method, the call of that method fails.

        Raises:
            BackendLoadError: The class makes something else than a differential backend.
        """
        spec = plan.spec
        backend = plan.read(base_spec=spec, adapter_path=spec.adapter)
        return require_differential(backend, f"entry_point {spec.entry_point!r}")


def _module(spec: ModelSpec, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpecError(
            f"entry_point {spec.entry_point!r}: the module {name!r} cannot be imported ({redacted(str(error))})."
            " Check its name, and that it can be imported where pytest runs."
        ) from error
    except Exception as error:
        if ends_run(error):
            raise
        raise BackendLoadError(
            f"entry_point {spec.entry_point!r}: the import of {name!r} failed: {type(error).__name__}:"
            f" {redacted(str(error))}"
        ) from error


def _require_signature(spec: ModelSpec, found: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # code in C may have no signature
        return
    try:
        signature.bind(base_spec=spec, adapter_path=spec.adapter)
    except TypeError as error:
        raise SpecError(
            f"pytest-sway calls entry_point {spec.entry_point!r} with base_spec=<the spec> and adapter_path=<a folder"
            f" or None>, but it takes ({', '.join(signature.parameters)}): {error}."
        ) from None
