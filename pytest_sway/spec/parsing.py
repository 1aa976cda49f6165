"""Parse a spec from a `ModelSpec`, a mapping, a configured name, or an object with a spec's attributes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeAlias

from pytest_sway.errors import SpecError
from pytest_sway.spec.kinds import KINDS, ON_HUBS
from pytest_sway.spec.model_kwargs import form_of
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.paths import short_name
from pytest_sway.system.wording import shown

__tracebackhide__ = True


class SpecAttributes(Protocol):
    """The attribute that an object needs to pass as a spec; dlm-sway's ``ModelSpec`` has it."""

    @property
    def base(self) -> str:
        """A hub id or a folder."""
        ...


SpecLike: TypeAlias = "ModelSpec | Mapping[str, Any] | str | SpecAttributes"
_FIELDS: Final = tuple(each.name for each in fields(ModelSpec) if each.init)
_MEMOISED: Final = frozenset({str, bool, int, float, type(None), tuple, type(Path())})
"""The types of values that mean the same if they and their types are equal; a mapping may hold 1 or ``True``."""


def parse_spec(value: SpecLike, *, named: Mapping[str, Any] = MappingProxyType({})) -> ModelSpec:
    """Return ``value`` as a `ModelSpec`.

    Args:
        value: A `ModelSpec`, a mapping of its fields, a name from ``named``, or any object with the same attributes.
        named: The configured specs by name, each in one of the other forms.

    Raises:
        SpecError: ``value`` has none of these forms, an unknown field, or a field with an invalid value.
    """
    if isinstance(value, ModelSpec):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(value)
    if isinstance(value, str):
        if value not in named:
            raise SpecError(_unknown_name(value, named))
        return parse_spec(named[value])
    if hasattr(value, "base"):
        return _from_mapping({name: getattr(value, name) for name in _FIELDS if hasattr(value, name)})
    if isinstance(value, os.PathLike):
        raise SpecError(f"a spec is no path. Pass {_as_field(os.fspath(value))}.")
    hint = " For several adapters, write {'base': ..., 'adapter': [...]}." if isinstance(value, list | tuple) else ""
    raise SpecError(
        f"a spec is a ModelSpec, a mapping of its fields or a configured name; found {type(value).__name__}:"
        f" {shown(value)}.{hint}"
    )


def label_as_written(value: SpecLike, root: Path) -> str:
    """Return the label of a spec with its paths as they were written: the same in each clone, wherever a link leads.

    A `ModelSpec` was made with its links followed, so its label has the names that they lead to.

    Args:
        value: The spec.
        root: The folder from which absolute paths inside of it are shown.
    """
    spec = parse_spec(value)
    given = value if isinstance(value, Mapping) else {name: getattr(value, name, None) for name in _FIELDS}
    names: dict[str, str] = {}
    for field in ("base", "finetuned", "adapter"):
        written = given.get(field)
        inside = given.get("adapter_subfolder") if field == "adapter" else None
        for each, found in _pairs(tuple(written) if isinstance(written, list) else written, getattr(spec, field)):
            if found is not None and os.path.isabs(found):
                names[str(found)] = _from_root(os.path.join(each, inside or ""), root)
    return spec.described(names=names)


def _from_root(path: str, root: Path) -> str:
    for folder in (str(root), os.path.realpath(root), os.getcwd()):
        if os.path.isabs(path) and Path(path).is_relative_to(folder):
            path = os.path.relpath(path, folder)
    return short_name(os.path.normpath(path))


def _from_mapping(values: Mapping[str, Any]) -> ModelSpec:
    for name in values:
        if name not in _FIELDS:
            raise SpecError(_unknown_field(name, values.get("kind", "hf")))
    adapter = values.get("adapter")
    hashable = {**values, "adapter": tuple(adapter)} if isinstance(adapter, list) else values
    if not _MEMOISED.issuperset(map(type, hashable.values())):
        return ModelSpec(**values)
    try:
        spec, hub_ids = _memoised(tuple(hashable), *hashable.values())
    except TypeError:  # an unhashable value in a list: let the checks of ModelSpec name the field
        return ModelSpec(**values)
    return ModelSpec(**values) if hub_ids is None or any(map(os.path.exists, hub_ids)) else spec


def _unknown_name(value: str, named: Mapping[str, Any]) -> str:
    known = ", ".join(sorted(named)) or "none are configured"
    if os.path.exists(value):
        return f"a text is the name of a configured spec, and {value!r} is a path. Pass {_as_field(value)}."
    close = difflib.get_close_matches(value, named, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"no spec is named {value!r} (named specs: {known}).{hint} Pass a mapping such as {{'base': ..., 'adapter':"
        " ...}, or configure the name under [tool.pytest-sway.specs]."
    )


def _as_field(path: str) -> str:
    """Return a mapping with the field that takes a path, as text."""
    field = "adapter" if os.path.isfile(os.path.join(path, "adapter_config.json")) else "base"
    return f"{{{field!r}: {path!r}, ...}}"


def _unknown_field(name: object, kind: object) -> str:
    others = {field for of, each in KINDS.items() if of != kind for field in each.fields}
    own = KINDS[str(kind)].fields if str(kind) in KINDS else ()
    known = [field for field in _FIELDS if field not in others or field in own]
    close = difflib.get_close_matches(str(name), known, n=1)
    form = form_of(str(name)) if kind == "hf" else None
    hint = f" {form}" if form else f" Did you mean {close[0]!r}?" if close else ""
    return f"a spec has no field {name!r}; those of kind {kind!r} are {', '.join(known)}.{hint}"


@lru_cache(maxsize=256, typed=True)  # 1 and True are equal
def _memoised(names: tuple[str, ...], *held: Any) -> tuple[ModelSpec, tuple[str, ...] | None]:
    """Return the spec of a mapping, and the hub ids in it; resolving its paths takes too long for a warm request.

    A hub id can become the name of a folder. There are no ids, but ``None``, if a path has ``~``, a link or the working
    folder in it, which can lead elsewhere later.
    """
    values = dict(zip(names, held, strict=True))
    spec = ModelSpec(**values)
    hub_ids: list[str] = []
    for name in ("base", "adapter", "finetuned", "answers"):
        for given, found in _pairs(values.get(name), getattr(spec, name)):
            if isinstance(found, str) and spec.kind in ON_HUBS and not os.path.isabs(found):
                hub_ids += [found] if name != "adapter" else []  # which is looked for at each request
            elif found is not None and not _leads_nowhere_else(given, found):
                return spec, None
    return spec, tuple(filter(None, hub_ids))


def _pairs(given: Any, found: Any) -> Iterable[tuple[Any, Any]]:
    """Return each value that was given with the one that a spec has for it; a list of one adapter is that adapter."""
    if not isinstance(given, tuple):
        return ((given, found),)
    return zip(given, found if isinstance(found, tuple) else (found,), strict=True)


def _leads_nowhere_else(given: Any, path: Path | str) -> bool:
    return os.path.isabs(given) and str(path) == os.path.normpath(given)
