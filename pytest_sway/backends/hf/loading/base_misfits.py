"""Where a base's config and its weights disagree: for which tensors, and by which field of the config.

A model is made of the config without memory for its weights, which takes little. Where another value of one field makes
one whose tensors are those of the files, that field is the one.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.loading.candidates import other_numbers
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded
from pytest_sway.system.wording import shown, some

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry

    Make = Callable[[Path], Any]
    Sizes = Mapping[str, tuple[int, ...]]

__tracebackhide__ = True

_PATIENCE: Final = 1.5
"""Seconds of the thread's own time after which no other value is tried; to make a model takes some hundredths, or more
where it is deep."""

_MOST: Final = 3
"""Fields that an error has room for."""


def other_sizes(path: Path, entries: Mapping[str, TensorEntry], make: Make) -> str:
    """Return examples of weights whose sizes in the files are not those of the config, in brackets, and the field.

    Nothing of a quantized base, whose weights have sizes of their own in the files.

    Args:
        path: The ``config.json``.
        entries: The tensors of the base's files.
        make: Makes a model of the ``config.json`` in a folder, without memory for its weights.
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
    """Return the field by which a config asks for weights that the files lack, as part of a sentence; or nothing.

    Args:
        path: The ``config.json``.
        entries: The tensors of the base's files.
        make: Makes a model of the ``config.json`` in a folder, without memory for its weights.
        missing: The names of the weights that are missing.
    """
    return _field(path, entries, make, make(path.parent).config, dict.fromkeys(missing, ()))


def _field(path: Path, entries: Mapping[str, TensorEntry], make: Make, config: Any, wrong: Sizes) -> str:
    """The fields of which one, at another value, would leave none of the tensors wrong, as a sentence."""
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
            except Exception:  # noqa: S112 - a value that no model is made of is not the right one
                continue
            if not any(name in asked and (name not in entries or entries[name].shape != asked[name]) for name in wrong):
                now = f"in place of {shown(fields[field])}" if field in fields else "which is not in it"
                found.setdefault(field, f"{field} = {value}, {now}")
    if not found:
        return f", by model_type = {shown(fields.get('model_type'))} in its config.json"
    return f". With {', or '.join(found.values())}, its config.json would ask for those of the file"


def _candidates(
    fields: Mapping[str, Any], all_fields: Mapping[str, Any], entries: Mapping[str, TensorEntry], wrong: Sizes
) -> Iterator[tuple[str, Any]]:
    """Other values of fields, those first that are the most probable.

    Args:
        fields: What the config says.
        all_fields: The same, with the values of fields that it does not name.
        entries: The tensors of the files.
        wrong: The sizes of the tensors that are not as in the files.
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
