"""Specs by name: those of the configuration, as ``--sway-set`` changes them for one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pytest_sway.errors import SpecError
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.parsing import parse_spec
from pytest_sway.system.redaction import redacted

_DEFAULTS = {field.name: field.default for field in fields(ModelSpec) if field.init}


class Change(NamedTuple):
    """One ``--sway-set NAME.FIELD=VALUE``; an empty value takes the field away."""

    name: str
    field: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}.{self.field}"


def named_specs(config: pytest.Config) -> dict[str, dict[str, Any]]:
    """The specs under ``[tool.pytest-sway.specs]`` of the root's pyproject.toml, with the changes of this run.

    Relative folders start at the root, also those of a change: workers may run in other folders.

    Raises:
        SpecError: The table is not one of tables.
    """
    specs = _configured(config.rootpath)
    for change in changes(config):
        spec = specs.setdefault(change.name, {})
        spec.pop(change.field, None)
        if change.value:
            spec[change.field] = _typed(change)
    return {name: _rooted(spec, config.rootpath) for name, spec in specs.items()}


def changes(config: pytest.Config) -> list[Change]:
    """What ``--sway-set`` asks for, in its order.

    Raises:
        pytest.UsageError: One is not of the form ``NAME.FIELD=VALUE``.
    """
    return [_change(text) for text in config.getoption("sway_set") or ()]


def check_changes(config: pytest.Config) -> str:
    """Return one line for pytest's header that shows what ``--sway-set`` has changed.

    Raises:
        pytest.UsageError: A change is malformed, names a field that does not exist, or makes no valid spec.
    """
    made = changes(config)
    try:
        configured, specs = _configured(config.rootpath), named_specs(config)
    except SpecError as error:
        raise pytest.UsageError(f"--sway-set: {error}") from None
    values = {str(change): _value(change, configured, specs) for change in made}
    return f"sway: set {', '.join(redacted(f'{name}={value}') for name, value in values.items())}"


def _value(change: Change, configured: Mapping[str, Any], specs: Mapping[str, Any]) -> object:
    """What a changed field holds, in the form in which specs keep it: without secrets."""
    known = ", ".join(sorted(configured)) or "none are configured"
    if change.field in _DEFAULTS and change.name not in configured and "base" not in specs[change.name]:
        raise pytest.UsageError(
            f"--sway-set {change}: no spec is named {change.name!r} (named specs: {known}). To make a new one, set its"
            f" base, too: --sway-set {change.name}.base=..."
        )
    try:
        value = getattr(parse_spec(specs[change.name]), change.field)
        return json.dumps(list(map(str, value))) if isinstance(value, tuple) else value
    except SpecError as error:
        raise pytest.UsageError(f"--sway-set {change}: {redacted(str(error))} (Named specs: {known}.)") from None


def _change(text: str) -> Change:
    target, equals, value = text.partition("=")
    name, _, field = target.strip().rpartition(".")
    if not (equals and name and field):
        raise pytest.UsageError(
            "--sway-set: must be NAME.FIELD=VALUE, such as candidate.adapter=runs/v4; found"
            f" {redacted(target if equals else text)!r}."
        )
    return Change(name, field, value.strip())


def _typed(change: Change) -> str | bool | float | list[Any]:
    """A field's value; one that cannot be its type stays a text, and the spec's own checks refuse it."""
    if change.field == "adapter" and change.value.startswith("["):
        try:
            return list(json.loads(change.value))
        except (ValueError, RecursionError):
            pass
    default = _DEFAULTS.get(change.field)
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(change.value.lower(), change.value)
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

    table = tomllib.loads(path.read_text("utf-8")).get("tool", {}).get("pytest-sway", {})
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
    for name in ("adapter", "answers"):
        if isinstance(spec.get(name), str) and not spec[name].lstrip().startswith("{"):  # answers may be JSON
            rooted[name] = str(rootpath / Path(spec[name]).expanduser())
    if isinstance(spec.get("adapter"), list):
        folders = spec["adapter"]
        rooted["adapter"] = [str(rootpath / Path(f).expanduser()) if isinstance(f, str) else f for f in folders]
    for name in ("base", "finetuned") if spec.get("kind", "hf") not in ("api", "dummy") else ():
        model = spec.get(name)
        if isinstance(model, str) and (model.startswith((".", "~")) or (rootpath / model).is_dir()):
            rooted[name] = str(rootpath / Path(model).expanduser())
    return rooted
