"""Turns PEFT's errors, which can be of any class, into errors that name the adapter and the field at fault."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.bounds import mending
from pytest_sway.backends.checkpoints.hub_files import config_of
from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, NAME
from pytest_sway.backends.hf.loading.misfits import defaults_of, hints_of, other_values
from pytest_sway.backends.libraries.culprits import Asked, culprit, explanation, said
from pytest_sway.errors import AdapterMismatchError, BackendLoadError, BackendNotAvailableError, SwayError, WeightsError
from pytest_sway.spec.model_kwargs import method_of, quantization_of
from pytest_sway.system.wording import shown, some

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_SAVED: Final = re.compile(r"\.modules_to_save\.([^.]{1,100})(?=\.)")
"""Matches what ``model.state_dict()`` puts into the names of a module that is saved whole."""


class AdapterFaultError(Exception):
    """A fault of an adapter, before the config field that causes it is known.

    Attributes:
        text: The fault, as a sentence without a full stop.
        advice: What to do, as sentences.
        again: Called with the adapter's model; raises while the fault is there. ``None`` if the load itself shows it.
    """

    def __init__(self, text: str, advice: str, again: Callable[[Any], None] | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.advice = advice
        self.again = again


def refused(base: ModelSpec, files: AdapterFiles, error: Exception, attempt: Callable[[Path], object]) -> SwayError:
    """Return the error for an adapter that PEFT rejects, or with which the model does not run.

    Args:
        base: The base's spec.
        files: The adapter's files.
        error: The error of PEFT or another library.
        attempt: Puts the adapter of another folder on the same base.
    """
    folder, weights = str(files.folder), files.stored.name
    if type(error).__name__ == "SafetensorError" or isinstance(error, EOFError):
        return WeightsError(f"the weights {str(files.stored)!r} cannot be read: {said(error)}")
    said_of_it = str(error)
    saved = _saved_by_state_dict(files, error)
    if saved is not None:
        return saved
    others = partial(other_values, files, said_of_it)
    asked = Asked("the adapter", files.folder, (CONFIG,), attempt, hints_of(files), defaults_of(files), others)
    if isinstance(error, KeyError) and error.args[0] not in files.config.values():
        error = AdapterFaultError(
            f"the adapter {folder!r} was not applied to {base.base!r}: its {CONFIG} asks for"
            f" {shown(error.args[0], 200)}, which its {weights} lacks",
            "Save the adapter again, config and weights together.",
        )
    elif "not present" in said_of_it:  # PEFT's words about the projections of VeRA and PVeRA
        error = AdapterFaultError(
            f"the adapter {folder!r} was not applied to {base.base!r}; the fault is in its {weights}:"
            f" {said(error).removesuffix('.')}",
            "Save the adapter again, config and weights together.",
        )
    elif "size mismatch" in said_of_it:
        error = AdapterFaultError(
            f"the adapter {folder!r} does not fit the base {base.base!r}, or its {CONFIG} does not fit its {weights}"
            f" ({_tensors(files, str(error))}): {said(error).removesuffix('.')}",
            "Name the base that it was trained on.",
        )
    if isinstance(error, AdapterFaultError):
        if error.again is not None:  # most other values have another effect, which proves nothing
            asked = asked._replace(others=lambda _: [((CONFIG, "task_type"), "CAUSAL_LM")])
        field = culprit(asked, said_of_it)
        why = "" if field is None else f" {field}. {field.advice}"
        kind = f"it is of the type {shown(files.peft_type)} (peft_type in its {CONFIG})"
        return AdapterMismatchError(f"{error.text}; {kind}.{why} {error.advice}")
    found = explanation(asked, error)
    if "target" in str(error).lower() and not isinstance(found, BackendNotAvailableError):
        return AdapterMismatchError(
            f"the adapter {folder!r} does not fit the base {base.base!r}: {found} If its files are as they were saved,"
            " name the base that it was trained on."
        )
    return found


def not_by_adapter(base: ModelSpec, files: AdapterFiles, error: Exception) -> BackendLoadError:
    """Return the error for a base that does not run, without an adapter either."""
    quantization = quantization_of(base.model_kwargs, config_of(base))
    how = "" if quantization is None else f", which is quantized by {method_of(quantization)},"
    return BackendLoadError(
        f"the base {base.base!r}{how} does not run, with the adapter {str(files.folder)!r} or without: {said(error)}"
        " So the adapter is not the cause. Copy or save the base again, or name another."
    )


def not_on_quantized(base: ModelSpec, files: AdapterFiles, error: Exception) -> AdapterMismatchError:
    """Return the error for an adapter that PEFT puts on a base's model, but not on its quantized layers."""
    method = method_of(quantization_of(base.model_kwargs, config_of(base)) or {})
    kind = f"{shown(files.peft_type)}{', use_dora' if files.config.get('use_dora') else ''} in its {CONFIG}"
    return AdapterMismatchError(
        f"PEFT cannot put the adapter {str(files.folder)!r} ({kind}) on layers that are quantized by {method}, as those"
        f" of {base.base!r} are: {said(error)} It fits the same model without quantization: name that as the base, or"
        " merge the adapter into it and quantize the result."
    )


def named_by_state_dict(files: AdapterFiles, name: str, tensors: str, part: str | None) -> AdapterMismatchError:
    """Return the error for a file with the names of ``model.state_dict()``, which have the adapter's name.

    Args:
        files: The adapter's files.
        name: That name.
        tensors: Some names of tensors that have it.
        part: A regular expression for what is to be taken out of the names; ``None`` where that is not certain.
    """
    made = "folder" if name == NAME else f"subfolder {name!r}"
    mended = "" if part is None else mending(files.stored, files.entries or {}, part)
    return AdapterMismatchError(
        f"the adapter {str(files.folder)!r} has tensors whose names contain the adapter's name {name!r} ({tensors}), as"
        " those of model.state_dict() do. Save it with"
        f" model.save_pretrained(folder, selected_adapters=[{name!r}]), and name the {made} that this makes.{mended}"
    )


def _saved_by_state_dict(files: AdapterFiles, error: Exception) -> AdapterMismatchError | None:
    """The error for a module of modules_to_save that PEFT does not find, since ``model.state_dict()`` named it."""
    named = {name: found for name in files.entries or () if (found := _SAVED.search(name))}
    for name, found in named.items():
        if isinstance(error, KeyError) and name[: found.start()] + name[found.end() :] == error.args[0]:
            own = re.escape(found[1])
            part = rf"\.modules_to_save\.{own}(?=\.)|\.{own}(?=(\.(weight|bias))?$)"
            return named_by_state_dict(files, found[1], some(named), part)
    return None


def _tensors(files: AdapterFiles, said: str) -> str:
    """Return the tensors of the file whose shapes are in torch's message."""
    return some(name for name, entry in (files.entries or {}).items() if f"({list(entry.shape)}) from" in said)
