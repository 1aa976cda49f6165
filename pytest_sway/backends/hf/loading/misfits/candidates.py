"""Proposes other values for the fields of a config, derived from the weights that were saved with it."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.libraries.culprits import Contents, Field

__tracebackhide__ = True

_NUMBER: Final = re.compile(r"\.(\d+)\.")
_MODULE: Final = re.compile(r"\.\d+\.(?:\w+\.)?(\w+)\.(?!\d)\w+(?:\.\w+)*$")
"""The module in a tensor's name: it comes after the layer's number, and is mostly a part of the layer."""
_SIZES: Final = re.compile(
    r"torch\.Size\(\[([\d, ]*)\]\) from checkpoint, the shape in current model is torch\.Size\(\[([\d, ]*)\]\)"
)
"""torch's words about a tensor that does not fit."""
_COUNT: Final = re.compile(r"layer|block|expert|module")
_FEW: Final = (1, 2, 3, 4)
_MOST: Final = 12
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
        yield from ((name, other) for other in [other for other in dict.fromkeys(whole) if other != value][:_MOST])


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
