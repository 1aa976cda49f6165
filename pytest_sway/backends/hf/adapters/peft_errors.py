"""What PEFT's errors say of an adapter: they are in words of its own, and of any class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_type_hints

from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, WEIGHTS
from pytest_sway.backends.libraries.culprits import Asked, explanation, said
from pytest_sway.errors import AdapterMismatchError, BackendNotAvailableError, SwayError, WeightsError
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


def refused(base: ModelSpec, files: AdapterFiles, error: Exception, attempt: Callable[[Path], object]) -> SwayError:
    """Return the error for an adapter that PEFT does not put on, or with which the model does not run.

    Args:
        base: What it was to be put on.
        files: The adapter.
        error: PEFT's error, or another library's.
        attempt: Puts the adapter of another folder on the same base.
    """
    folder = str(files.folder)
    if type(error).__name__ == "SafetensorError" or isinstance(error, EOFError):
        return WeightsError(f"the weights {str(files.folder / WEIGHTS)!r} cannot be read: {said(error)}")
    if isinstance(error, ImportError) or "is not available" in str(error):
        return BackendNotAvailableError(
            f"the adapter {folder!r}, of the type {files.peft_type}, needs what this environment lacks"
            f" (by its {CONFIG}): {said(error)}"
        )
    if isinstance(error, KeyError) and error.args[0] not in files.config.values():
        return AdapterMismatchError(
            f"the adapter {folder!r} was not applied to {base.base!r}: its {CONFIG} asks for"
            f" {shown(error.args[0], 200)}, which its {WEIGHTS} lacks. Save the adapter again, config and weights"
            " together."
        )
    if "size mismatch" in str(error):
        return AdapterMismatchError(
            f"the adapter {folder!r} does not fit the base {base.base!r}, or its {CONFIG} does not fit its {WEIGHTS}:"
            f" {said(error)} Name the base that it was trained on."
        )
    found = explanation(Asked("the adapter", files.folder, (CONFIG,), attempt, _hints(files)), error)
    if "target" in str(error).lower():
        return AdapterMismatchError(
            f"the adapter {folder!r} does not fit the base {base.base!r}: {found} If its files are as they were saved,"
            " name the base that it was trained on."
        )
    return found


def _hints(files: AdapterFiles) -> dict[str, Any]:
    """The types of the fields of an adapter's config, as PEFT declares them."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    configs: dict[Any, Any] = {**PEFT_TYPE_TO_CONFIG_MAPPING}
    return get_type_hints(configs[files.peft_type]) if files.peft_type in configs else {}
