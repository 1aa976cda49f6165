"""Tests of the mlx backend: only ``tox -e mlx`` has what they need, and names their folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.registry import Builder
from pytest_sway.spec.model_spec import ModelSpec
from tests.tiny import make_adapter, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="session")
def other_adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("other"), base, seed=2, targets=("q_proj", "up_proj", "down_proj"))


@pytest.fixture
def loads() -> list[str]:
    """The names of the bases that were loaded, in order."""
    return []


@pytest.fixture
def build(loads: list[str]) -> Iterator[Callable[..., Any]]:
    """Build a backend, of kind ``mlx`` unless told otherwise; it is closed after the test."""
    builder = Builder(on_base_load=lambda name, seconds: loads.append(name))
    built: list[Any] = []

    def _build(base: Path, adapter: Path | None = None, **fields: Any) -> Any:
        built.append(builder(ModelSpec(**({"kind": "mlx", "device": "cpu"} | fields), base=str(base), adapter=adapter)))
        return built[-1]

    yield _build
    for backend in built:
        backend.close()
