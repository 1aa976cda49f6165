"""Finds where a base's config and weights disagree: the tensors, the field of the config, and the value that would fit.

A model made from the config on the meta device has the shapes that the config asks for. If another value of one field
gives the shapes in the files, that field is at fault. The other values are derived from the weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin, get_type_hints

from pytest_sway.system.reading import CONFIG_BYTES, read_bounded
from pytest_sway.system.wording import shown, some

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry
    from pytest_sway.backends.libraries.culprits import Contents, Field

    Make = Callable[[Path], Any]
    Sizes = Mapping[str, tuple[int, ...]]

__tracebackhide__ = True


_PATIENCE: Final = 1.5
"""Seconds of this thread's CPU time after which the search stops. Making a model takes some hundredths of a second, and
more if it is deep."""

_MOST_FOUND: Final = 3
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
            if time.thread_time() > until or len(found) == _MOST_FOUND:
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


_NUMBER: Final = re.compile(r"\.(\d+)\.")
_MODULE: Final = re.compile(r"\.\d+\.(?:\w+\.)?(\w+)\.(?!\d)\w+(?:\.\w+)*$")
"""The module in a tensor's name: it comes after the layer's number, and is mostly a part of the layer."""
_SIZES: Final = re.compile(
    r"torch\.Size\(\[([\d, ]*)\]\) from checkpoint, the shape in current model is torch\.Size\(\[([\d, ]*)\]\)"
)
"""torch's words about a tensor that does not fit."""
_COUNT: Final = re.compile(r"layer|block|expert|module")
_FEW: Final = (1, 2, 3, 4)
_MOST_VALUES: Final = 12
"""The most values that are tried for one field."""


def other_numbers(
    fields: Mapping[str, Any],
    given: Collection[str],
    pairs: Collection[tuple[int, int]],
    names: Collection[str],
    sides: Iterable[int],
) -> Iterator[tuple[str, int]]:
    """Yield other values of integer fields, the most probable first.

    Args:
        fields: The values of all fields, with defaults for those that the config does not set.
        given: The names of the fields that the config sets.
        pairs: Sizes of tensors that differ: in the file, and by the config.
        names: The names of the tensors in the file.
        sides: Sizes to try if no pairs are known.
    """
    numbered = [1 + int(number) for name in names for number in _NUMBER.findall(name)]
    layers = max((number for number in numbered if number <= len(names)), default=0)
    asked_sides = {asked for _, asked in pairs}
    numbers = [(name, value) for name, value in fields.items() if type(value) is int and not name.endswith("_id")]
    for name, value in sorted(numbers, key=lambda item: (item[1] not in asked_sides, item[0] not in given)):
        found_sides = [found for found, asked in pairs if asked == value] or [found for found, _ in pairs]
        scaled = [value * a / b for pair in pairs for a, b in (pair, pair[::-1]) if b]
        others = [*found_sides, *scaled] if pairs else [layers, *_FEW, *sides]
        most = max(layers, value) if _COUNT.search(name) else math.inf  # many layers or experts take long to make
        whole = [int(other) for other in others if most >= other == int(other) > 0]
        yield from (
            (name, other) for other in [other for other in dict.fromkeys(whole) if other != value][:_MOST_VALUES]
        )


def other_values(files: AdapterFiles, said: str, contents: Contents) -> Iterator[tuple[Field, Any]]:
    """Yield other values of fields of an ``adapter_config.json``, with which the config may fit the weights.

    Args:
        files: The adapter's files.
        said: PEFT's error message.
        contents: The config, by its file's name.
    """
    if files.entries is None:
        return
    hints, ((file, config),) = hints_of(files), contents.items()
    fields = defaults_of(files) | dict(config)
    shapes = list(_shapes(said))
    alike = ((found, asked) for found, asked in shapes if len(found) == len(asked))
    pairs = {(a, b) for found, asked in alike for a, b in zip(found, asked, strict=True) if a != b}
    rows = {found[0] for found, _ in shapes if found}
    modules = _modules(files.entries)
    if config.get("task_type") is None:
        yield (file, "task_type"), "CAUSAL_LM"
    whole = {name for name in fields if int in _kinds(hints.get(name))}
    numbers = fields | {name: 0 for name in whole if type(fields[name]) is not int}
    sides = sorted({side for entry in files.entries.values() for side in entry.shape})
    for name, other in other_numbers(numbers, config, pairs, files.entries, sides):
        yield (file, name), other
    typed = (
        (name, other)
        for name in fields
        for other in _of_type(hints.get(name), rows, modules if "modules" in name else ())
    )
    for name, other in sorted(typed, key=lambda item: isinstance(item[1], str)):  # strings seldom change any shape
        if other != fields[name] or type(other) is not type(fields[name]):
            yield (file, name), other


def hints_of(files: AdapterFiles) -> dict[str, Any]:
    """Return PEFT's type hints for the fields of an adapter's config."""
    kind = _kind(files)
    return {} if kind is None else get_type_hints(kind)


def defaults_of(files: AdapterFiles) -> dict[str, Any]:
    """Return PEFT's defaults for the fields of an adapter's config."""
    kind = _kind(files)
    return {} if kind is None else {field.name: field.default for field in dataclasses.fields(kind) if field.init}


def _kind(files: AdapterFiles) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds: dict[Any, Any] = {**PEFT_TYPE_TO_CONFIG_MAPPING}
    return kinds.get(files.peft_type)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return a type hint, followed by its arguments."""
    return (hint, *get_args(hint))


def _of_type(hint: Any, rows: Collection[int], modules: Collection[str]) -> Iterator[Any]:
    """Yield values that a field with this type hint may have."""
    if bool in _kinds(hint):
        yield from (True, False)
    for each in _kinds(hint):
        if get_origin(each) is Literal:
            yield from get_args(each)
        elif get_origin(each) is list and get_args(each) == (int,):
            yield from (list(range(count)) for count in rows)
        elif get_origin(each) in (list, set) and get_args(each) == (str,) and modules:
            yield list(modules)
            if len(modules) > 1:
                yield from ([module] for module in modules)


def _shapes(said: str) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the shapes that differ: in the file, and as PEFT asks for them."""
    for both in _SIZES.findall(said):
        found, asked = (tuple(int(side) for side in shape.split(",") if side.strip()) for shape in both)
        yield found, asked


def _modules(names: Iterable[str]) -> list[str]:
    """Return the last part of the name of each module that an adapter's tensors belong to."""
    found = filter(None, map(_MODULE.search, names))
    return sorted({match[1] for match in found})
