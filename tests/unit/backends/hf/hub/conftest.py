from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pytest_httpserver import HTTPServer

from tests.hub import Files, ToyHub, files_of, use_cache, use_hub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def _server() -> Iterator[HTTPServer]:
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub, of a process that is offline and works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def hub(_server: HTTPServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyHub]:
    """An empty hub, in the place of huggingface.co."""
    toy = ToyHub(_server)
    with use_hub(monkeypatch, toy.url):
        yield toy
    _server.clear()


@pytest.fixture(scope="session")
def adapter_files(adapter: Path) -> Files:
    return files_of(adapter)
