from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
from pytest_httpserver import HTTPServer

from tests.unit.backends.hf.hub.toy import Files, ToyHub, files_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PROXIES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@pytest.fixture(scope="session")
def _server() -> Iterator[HTTPServer]:
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub, of a process that is offline."""
    constants = import_module("huggingface_hub.constants")
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_TOKEN_PATH", str(tmp_path / "no token"))):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub(_server: HTTPServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyHub]:
    """An empty hub, in the place of huggingface.co."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *_PROXIES):
        monkeypatch.delenv(name, raising=False)
    toy = ToyHub(_server)
    take_the_place_of_the_hub(monkeypatch, toy.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between huggingface_hub's attempts
    _forget_connections()
    yield toy
    _forget_connections()
    _server.clear()


@pytest.fixture(scope="session")
def adapter_files(adapter: Path) -> Files:
    return files_of(adapter)


def take_the_place_of_the_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Have huggingface_hub, which has read its endpoint when it was imported, ask another one."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    for module in map(import_module, ("huggingface_hub.constants", "huggingface_hub.file_download")):
        for name in values.keys() & vars(module).keys():  # before its version 1, the second has copies
            monkeypatch.setattr(module, name, values[name])


def _forget_connections() -> None:
    """Before its version 1, huggingface_hub keeps connections that know whether they are offline."""
    reset = getattr(sys.modules.get("huggingface_hub.utils"), "reset_sessions", None)
    if reset is not None:
        reset()
