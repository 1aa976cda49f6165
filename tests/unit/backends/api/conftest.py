from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from pytest_httpserver import HTTPServer

from pytest_sway import ModelSpec
from pytest_sway.backends.api.backend import ApiBackend
from pytest_sway.backends.api.builder import build_api
from tests.unit.backends.api.toy import Toy

Build: TypeAlias = Callable[..., ApiBackend]


@pytest.fixture(autouse=True)
def _no_keys_and_no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWAY_API_KEY", "OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def _server() -> Iterator[HTTPServer]:
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def server(_server: HTTPServer) -> Iterator[HTTPServer]:
    yield _server
    _server.check()
    _server.clear()


@pytest.fixture
def toy(server: HTTPServer, request: pytest.FixtureRequest) -> Toy:
    return Toy(server, getattr(request, "param", "openai"))


@pytest.fixture
def sleeps() -> list[float]:
    """The seconds that the test's backends would have slept between attempts."""
    return []


@pytest.fixture
def build(toy: Toy, sleeps: list[float]) -> Iterator[Build]:
    """Builds backends of the toy server with a fake clock, and closes them."""
    built: list[ApiBackend] = []

    async def sleep(seconds: float) -> None:
        sleeps.append(seconds)

    def make(**fields: Any) -> ApiBackend:
        spec = ModelSpec(**{"kind": "api", "base": "base", "finetuned": "tuned", "endpoint": toy.url, **fields})
        built.append(build_api(spec, sleep=sleep))
        return built[-1]

    yield make
    for backend in built:
        backend.close()
