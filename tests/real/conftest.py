"""Fixtures of SmolLM2-135M-Instruct, and of adapters that change its answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.smollm2 import smollm2_folder
from pytest_sway.cache.backend_cache import BackendCache
from tests.tiny import make_adapter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("real")


@pytest.fixture(scope="session")
def base() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(root / f"adapter{n}", base, seed=n, r=8, scale=0.02) for n in range(3)]


@pytest.fixture
def cache() -> Iterator[BackendCache]:
    cache = BackendCache(max_size=2)
    yield cache
    cache.shutdown()
    assert cache.stats.close_errors == []
