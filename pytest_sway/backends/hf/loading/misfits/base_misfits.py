"""Finds where a base's config and weights disagree: the tensors, and the field of the config.

A model made from the config on the meta device has the shapes that the config asks for. If another value of one field
gives the shapes in the files, that field is at fault.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.loading.misfits.candidates import other_numbers
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded
from pytest_sway.system.wording import shown, some

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry

    Make = Callable[[Path], Any]
    Sizes = Mapping[str, tuple[int, ...]]

__tracebackhide__ = True

_PATIENCE: Final = 1.5
"""Seconds of this thread's CPU time after which the search stops. Making a model takes some hundredths of a second, and
more if it is deep."""

_MOST: Final = 3
"""The most fields that an error names."""


def other_sizes(path: Path, entries: Mapping[str, TensorEntry], make: Make) -> str:
    """Return, in brackets, weights whose shapes in the files differ from the config's, and the field at fault.

    Return an empty text for a quantized base, whose weights have other shapes in the files.

    Args:
        path: The ``config.json``.
        entries: The tensors of the base's files.
        make: Makes a model of the ``config.json`` in a folder, on the meta device.
    """
    model = make(path.parent)
    if getattr(model.config, "quantization_config", None):
        return ""
    asked = _sizes(model)
    wrong = {name: shape for name, shape in asked.items() if name in entries and entries[name].shape != shape}
    if not wrong:
        return ""
    examples = [
        f"{name}: {list(entries[name].shape)} in the file, {list(shape)} by the config" for name, shape in wrong.items()
    ]
    return f" ({some(examples)}){_field(path, entries, make, model.config, wrong)}"


def why_lacking(path: Path, entries: Mapping[str, TensorEntry], make: Make, missing: Collection[str]) -> str:
    """Return, as part of a sentence, the field by which a config asks for weights that the files lack.

    Args:
        path: The ``config.json``.
        entries: The tensors of the base's files.
        make: Makes a model of the ``config.json`` in a folder, on the meta device.
        missing: The names of the missing weights.
    """
    return _field(path, entries, make, make(path.parent).config, dict.fromkeys(missing, ()))


def _field(path: Path, entries: Mapping[str, TensorEntry], make: Make, config: Any, wrong: Sizes) -> str:
    """Return, as part of a sentence, the fields that with another value would make all ``wrong`` tensors right."""
    until = time.thread_time() + _PATIENCE
    fields: dict[str, Any] = json.loads(read_bounded(path, CONFIG_BYTES))
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="sway-") as scratch:
        for field, value in _candidates(fields, config.to_dict(), entries, wrong):
            if time.thread_time() > until or len(found) == _MOST:
                break
            Path(scratch, path.name).write_text(json.dumps(fields | {field: value}))
            try:
                asked = _sizes(make(Path(scratch)))
            except Exception:  # noqa: S112 - a value that allows no model is not the right one
                continue
            if not any(name in asked and (name not in entries or entries[name].shape != asked[name]) for name in wrong):
                now = f"in place of {shown(fields[field])}" if field in fields else "which is not in it"
                found.setdefault(field, f"{field} = {value}, {now}")
    if not found:
        return f"; its config.json has model_type = {shown(fields.get('model_type'))}"
    return f". With {', or '.join(found.values())}, its config.json would ask for those of the file"


def _candidates(
    fields: Mapping[str, Any], all_fields: Mapping[str, Any], entries: Mapping[str, TensorEntry], wrong: Sizes
) -> Iterator[tuple[str, Any]]:
    """Yield other values of config fields, the most probable first.

    Args:
        fields: The fields in the config.
        all_fields: The same, with the defaults of all other fields.
        entries: The tensors of the files.
        wrong: The shapes that the config asks for, of tensors that differ from the files.
    """
    pairs = {
        (found, asked)
        for name, shape in wrong.items()
        if name in entries and len(shape) == len(entries[name].shape)
        for found, asked in zip(entries[name].shape, shape, strict=True)
        if found != asked
    }
    given = {name: all_fields.get(name, value) for name, value in fields.items()}
    yield from other_numbers(given | {**all_fields}, fields, pairs, entries, ())
    for name, value in all_fields.items():
        if type(value) is bool:
            yield name, not value


def _sizes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
