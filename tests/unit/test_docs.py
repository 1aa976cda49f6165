"""The reference lists exactly the existing errors, options, fields of a spec and hooks."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import pytest_sway
from pytest_sway import ModelSpec, errors, scores
from pytest_sway.plugin import HookSpecs, pytest_addoption
from tests.benchmarks.scale import pages

REFERENCE = Path(__file__).parents[2] / "docs" / "pages" / "reference"
CLASSES = [name for name, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__]


def _headings(page: str) -> list[str]:
    return re.findall(r"^## `?(\w+)", (REFERENCE / page).read_text("utf-8"), re.MULTILINE)


def _cells(page: str, column: int) -> list[str]:
    """Return the code in a column of a page's tables, without the part after an equals sign."""
    rows = re.findall(r"^\|(.*)\|$", (REFERENCE / page).read_text("utf-8"), re.MULTILINE)
    cells = [row.split("|")[column].strip() for row in rows]
    return [match[1] for cell in cells if (match := re.fullmatch(r"`([\w-]+)(?:=\w+)?`", cell))]


def test_each_error_has_its_place_and_each_place_its_error() -> None:
    assert sorted(_headings("errors.md")) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_names_its_own_place(name: str) -> None:
    error = getattr(errors, name)("what was asked")
    assert errors.name_page(error)
    assert error.__notes__ == [f"See {name} in the docs of pytest-sway: reference/errors.md#{name.lower()}"]


def test_the_tree_of_errors_is_that_of_the_module() -> None:
    drawn = re.findall(r"^ {4}([│├└─ ]*\w+Error(?: \(\w+\))?)", inspect.cleandoc(errors.__doc__ or ""), re.MULTILINE)
    assert "\n".join(drawn) in (REFERENCE / "errors.md").read_text("utf-8")


def test_each_option_is_in_the_table() -> None:
    parser = pytest.Parser(_ispytest=True)
    pytest_addoption(parser)
    options = [name for option in parser.getgroup("sway").options for name in option.names()]
    assert sorted(_cells("options.md", 0)) == sorted(options)
    assert sorted(_cells("options.md", 1)) == sorted(name for name in parser._inidict if name.startswith("sway_"))


def test_each_field_of_a_spec_is_in_a_table() -> None:
    kinds = {"hf", "mlx", "api", "dummy", "custom"}
    assert set(_cells("specs.md", 0)) - kinds == {field.name for field in fields(ModelSpec) if field.init}


def test_each_hook_has_its_place() -> None:
    hooks = [name for name, _ in inspect.getmembers(HookSpecs, inspect.isfunction)]
    assert sorted(_headings("hooks.md")) == sorted(hooks)


def test_each_public_name_is_in_the_reference() -> None:
    shown = "".join(page.read_text("utf-8") for page in REFERENCE.glob("*.md"))
    plain = {"Message", "Prompt"}  # aliases; views.md describes them
    missing = [name for name in pytest_sway.__all__ if f"::: pytest_sway.{name}\n" not in shown and name not in plain]
    assert missing == ["SwayError", "SwayWarning"]  # they are in errors.md


def test_each_score_is_in_the_reference() -> None:
    shown = (REFERENCE / "python.md").read_text("utf-8")
    assert [name for name in scores.__all__ if f"::: pytest_sway.scores.{name}\n" not in shown] == ["Metric"]


def test_the_simulated_tables_are_current() -> None:
    for path, current in pages():
        assert path.read_text("utf-8") == current, f"run python -m tests.benchmarks.scale to update {path.name}"
