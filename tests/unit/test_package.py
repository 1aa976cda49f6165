"""The installed package: its version, and the name of its plugin."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import pytest_sway

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert pytest_sway.__version__ == version("pytest-sway")


def test_a_suite_can_ask_for_a_version() -> None:
    assert pytest.importorskip("pytest_sway", minversion="0.1.0") is pytest_sway
    with pytest.raises(pytest.skip.Exception, match=r"has __version__ '0\.\d+\.\d+', required is: '999'"):
        pytest.importorskip("pytest_sway", minversion="999")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", _not_installed)
    with pytest.raises(AttributeError, match="pytest-sway is not installed"):
        pytest_sway.__version__  # noqa: B018 # asked for its error


def _not_installed(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


@pytest.fixture
def plugin_name() -> str:
    (name,) = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]["entry-points"]["pytest11"]
    return str(name)


@pytest.mark.parametrize(("option", "blocked"), [("no:pytest-sway", True), ("no:sway", False)])
def test_only_its_own_name_switches_the_plugin_off(plugin_name: str, option: str, blocked: bool) -> None:
    """dlm-sway's plugin is ``sway``, and pytest takes ``-p no:sway`` to mean ``pytest_sway`` as well."""
    manager = pytest.PytestPluginManager()
    manager.consider_pluginarg(option)
    assert manager.is_blocked(plugin_name) is blocked
