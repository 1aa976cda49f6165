"""Named specs: those of the configuration, with the changes of ``--sway-set`` for one run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from pytest_sway.errors import SpecError
from pytest_sway.spec.hub_names import is_address, is_elsewhere, is_hub_id
from pytest_sway.spec.kinds import ON_HUBS
from pytest_sway.spec.model_kwargs import as_mapping
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.parsing import parse_spec
from pytest_sway.spec.paths import begins_as_path, is_path
from pytest_sway.system.redaction import redacted

_INSIDE: Final = re.compile(r"(?P<name>.+?)\.(?P<field>(finetuned_)?model_kwargs)\.(?P<keys>.+)")
_TRUTHS: Final = {"true": True, "false": False}
_DEFAULTS = {field.name: field.default for field in fields(ModelSpec) if field.init}


class Change(NamedTuple):
    """One ``--sway-set NAME.FIELD=VALUE``; an empty value removes the field.

    ``keys`` lead to the changed value in a field that is a mapping, such as ``model_kwargs``; it is empty for others.
    """

    name: str
    field: str
    value: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.name, self.field, *self.keys))


def named_specs(config: pytest.Config) -> dict[str, dict[str, Any]]:
    """Return the specs under ``[tool.pytest-sway.specs]`` of the root's pyproject.toml, with this run's changes.

    Relative folders start at the root, even those of a change, since workers may run in other folders.

    Raises:
        SpecError: A value in the table is not a table.
    """
    specs = _configured(config.rootpath)
    for change in changes(config):
        spec = specs.setdefault(change.name, {})
        _put(change, spec)
    return {name: _rooted(spec, config.rootpath) for name, spec in specs.items()}


def changes(config: pytest.Config) -> list[Change]:
    """Return the changes of ``--sway-set``, in the order of the command line.

    Raises:
        pytest.UsageError: One is not of the form ``NAME.FIELD=VALUE``.
    """
    return [_change(text) for text in config.getoption("sway_set") or ()]


def check_changes(config: pytest.Config) -> str:
    """Return one line for pytest's header that shows the changes of ``--sway-set``.

    Raises:
        pytest.UsageError: A change is malformed, names an unknown field, or makes a spec invalid.
    """
    made = changes(config)
    try:
        configured, specs = _configured(config.rootpath), named_specs(config)
    except SpecError as error:
        raise pytest.UsageError(f"--sway-set: {redacted(str(error))}") from None
    values = {str(change): _value(change, configured, specs) for change in made}
    return f"sway: set {', '.join(redacted(f'{name}={value}') for name, value in values.items())}"


def _value(change: Change, configured: Mapping[str, Any], specs: Mapping[str, Any]) -> object:
    """Return the value of a changed field as the spec holds it, without secrets."""
    known = ", ".join(sorted(configured)) or "none are configured"
    if change.field in _DEFAULTS and change.name not in configured and "base" not in specs[change.name]:
        raise pytest.UsageError(
            f"--sway-set {change}: no spec is named {change.name!r} (named specs: {known}). To add a spec, set its"
            f" base, too: --sway-set {change.name}.base=..."
        )
    # A field that was only removed is checked too, by its name.
    spec = specs[change.name] if change.field in _DEFAULTS else {**specs[change.name], change.field: change.value}
    try:
        value = getattr(parse_spec(spec), change.field)
        if change.keys:
            return _inside(as_mapping(value), change.keys)
        return json.dumps(list(map(str, value))) if isinstance(value, tuple) else value
    except SpecError as error:
        raise pytest.UsageError(f"--sway-set {change}: {redacted(str(error))} (Named specs: {known}.)") from None


def _inside(held: Any, keys: tuple[str, ...]) -> str | None:
    """Return a value in a mapping as JSON; ``None`` if a change has removed it or what it was in."""
    for key in keys:
        if not isinstance(held, dict) or key not in held:
            return None
        held = held[key]
    return json.dumps(held)


def _change(text: str) -> Change:
    target, equals, value = text.partition("=")
    inside = _INSIDE.fullmatch(target.strip())
    if equals and inside is not None:
        return Change(inside["name"], inside["field"], value.strip(), tuple(inside["keys"].split(".")))
    name, _, field = target.strip().rpartition(".")
    if not (equals and name and field):
        raise pytest.UsageError(
            "--sway-set: must be NAME.FIELD=VALUE, such as candidate.adapter=runs/v4; found"
            f" {redacted(target if equals else text)!r}."
        )
    return Change(name, field, value.strip())


def _put(change: Change, spec: dict[str, Any]) -> None:
    """Change a spec, or what is inside of one of its fields; a mapping in a field goes away with its last key.

    Raises:
        SpecError: There is no mapping that the change could go into, or the value should be JSON.
    """
    within: list[tuple[dict[str, Any], str]] = []
    for key in (change.field, *change.keys)[:-1]:
        if not change.value and key not in spec:
            return  # there is nothing to remove
        held = spec.get(key)
        if held is None or isinstance(held, str):
            held = _json(held or "{}")
        if not isinstance(held, dict):
            raise SpecError(f"{change} is to go into {key!r}, which is no mapping: {held!r}.")
        within.append((spec, key))
        spec[key] = dict(held)
        spec = spec[key]
    last = change.keys[-1] if change.keys else change.field
    spec.pop(last, None)
    if change.value:
        spec[last] = _plain(change) if change.keys else _typed(change)
        return
    for holder, key in reversed(within[1:]):  # an empty field stays: it says that there are none
        if not holder[key]:
            del holder[key]


def _plain(change: Change) -> Any:
    """Return a change's value within a mapping: what JSON makes of it, a truth value, else the text itself.

    Raises:
        SpecError: It begins as a list or a mapping, and is no JSON.
    """
    text = change.value
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    if text.startswith(("[", "{")):
        what, example = ("list", '["a", "b"]') if text[0] == "[" else ("mapping", '{"a": 1}')
        raise SpecError(f"the value of {change} begins as a {what}, which is JSON, such as {example}; found {text!r}.")
    return _TRUTHS.get(text.lower(), text)


def _json(text: str) -> Any:
    """What JSON makes of a text, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _typed(change: Change) -> Any:
    """Return a change's value in its field's type; a value of another type stays a text, which the spec refuses."""
    if change.field == "adapter" and change.value.startswith(("[", "{")):
        return _plain(change)
    default = _DEFAULTS.get(change.field)
    if isinstance(default, bool):
        return _TRUTHS.get(change.value.lower(), change.value)
    if isinstance(default, float):
        try:
            return float(change.value)
        except ValueError:
            pass
    return change.value


def _configured(rootpath: Path) -> dict[str, dict[str, Any]]:
    path = rootpath / "pyproject.toml"
    if not path.is_file():
        return {}
    import tomllib

    try:
        table = tomllib.loads(path.read_text("utf-8")).get("tool", {}).get("pytest-sway", {})
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read: {error}.") from error
    specs = table.get("specs", {}) if isinstance(table, dict) else table
    fields = specs.values() if isinstance(specs, dict) else [specs]
    wrong = next((value for value in fields if not isinstance(value, dict)), None)
    if wrong is not None:
        raise SpecError(
            f"{path}: [tool.pytest-sway.specs] must hold one table of fields for each name, such as"
            f" v3 = {{ base = ..., adapter = ... }}; found {wrong!r}."
        )
    return {name: dict(spec) for name, spec in specs.items()}


def _rooted(spec: dict[str, Any], rootpath: Path) -> dict[str, Any]:
    rooted = dict(spec)
    kind = spec.get("kind", "hf")
    for name in ("adapter", "answers"):
        given = spec.get(name)
        if isinstance(given, list):
            rooted[name] = [_rooted_path(name, each, kind, rootpath) for each in given]
        elif given is not None:
            rooted[name] = _rooted_path(name, given, kind, rootpath)
    for name in ("base", "finetuned") if kind not in ("api", "dummy") else ():
        model = spec.get(name)
        if not isinstance(model, str) or not model.strip() or is_address(model):
            continue
        if _is_local(model, kind, rootpath):
            rooted[name] = str(rootpath / _expanded(model))
    return rooted


def _is_local(model: str, kind: Any, rootpath: Path) -> bool:
    """Return whether a base or a fine-tuned model is a path, seen from the root."""
    if kind == "custom":  # its class may know other names than a hub's
        return begins_as_path(model) or (rootpath / model).exists()
    return is_path(model) or (rootpath / model).is_dir()


def _rooted_path(name: str, given: Any, kind: Any, rootpath: Path) -> Any:
    """Return an adapter's folder or the file of answers, seen from the root; everything else as it is."""
    if not isinstance(given, str) or not given.strip() or given.lstrip().startswith("{"):  # answers may be JSON
        return given
    # A run may make the folder later, and in another one: then what it is in is there.
    on_hub = is_address(given) or (is_hub_id(given) and not (rootpath / given).parent.is_dir())
    if name == "adapter" and (on_hub if kind in ON_HUBS else kind == "custom" and is_elsewhere(given)):
        return given
    return str(rootpath / _expanded(given))


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # there is no such user
        raise SpecError(f"the path {path!r} cannot be expanded: {error}") from None
