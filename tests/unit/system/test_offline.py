"""Offline mode applies to child processes, to libraries imported later, and to those already imported."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway.system.offline import VARIABLES, go_offline


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for module in ("huggingface_hub.constants", "huggingface_hub.utils", "transformers.utils.hub"):
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.usefixtures("online")
def test_the_environment_says_so_until_it_is_put_back() -> None:
    restore = go_offline()
    assert [os.environ.get(name) for name in VARIABLES] == ["1", "1"]
    restore()
    assert not set(VARIABLES) & set(os.environ)


@pytest.mark.usefixtures("online")
def test_what_the_environment_said_before_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    go_offline()()
    assert os.environ["HF_HUB_OFFLINE"] == "0"


@pytest.mark.usefixtures("online")
def test_libraries_that_are_imported_already_go_offline_and_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[str] = []
    hub, transformers = SimpleNamespace(HF_HUB_OFFLINE=False), SimpleNamespace(_is_offline_mode=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", hub)
    monkeypatch.setitem(sys.modules, "transformers.utils.hub", transformers)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", SimpleNamespace(reset_sessions=lambda: resets.append("")))
    restore = go_offline()
    assert (hub.HF_HUB_OFFLINE, transformers._is_offline_mode, len(resets)) == (True, True, 1)
    restore()
    assert (hub.HF_HUB_OFFLINE, transformers._is_offline_mode, len(resets)) == (False, False, 2)


def test_the_real_libraries_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hub: Any = import_module("transformers.utils.hub")
    for module, name in ((import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE"), (hub, "_is_offline_mode")):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, False)
    assert not hub.is_offline_mode()
    restore = go_offline()
    assert hub.is_offline_mode()
    restore()
    assert not hub.is_offline_mode()
