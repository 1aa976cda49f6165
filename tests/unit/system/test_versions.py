"""Versions of libraries and names of devices."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from pytest_sway.system.machine import device_names, imported_versions


def test_only_what_is_imported_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    found = imported_versions()
    assert (found["python"], found["pytest"]) == (platform.python_version(), version("pytest"))
    assert "torch" not in found
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert imported_versions()["torch"] == version("torch")


def test_a_source_folder_that_is_not_installed_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_sway.system.machine._LIBRARIES", {"pytest": "nobody-has-installed-this"})
    assert set(imported_versions()) == {"python"}


def test_a_device_has_the_name_of_its_hardware_where_torch_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(cuda=SimpleNamespace(get_device_name=lambda device: f"a card at {device}"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    names = device_names({"cuda:0", "cpu", "mps"})
    assert names == {"cpu": platform.processor() or platform.machine(), "cuda:0": "a card at cuda:0", "mps": ""}
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    assert device_names({"cuda:0"}) == {"cuda:0": ""}
