"""Kind ``mlx`` answers the questions of `tests.unit.kinds` like all other kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.mlx.builder import MLXBuilder
from pytest_sway.spec.model_spec import ModelSpec
from tests.unit.kinds import Agreement


@pytest.fixture(scope="module")
def make(base: Path, adapter: Path) -> Callable[[], Any]:
    return partial(MLXBuilder(), ModelSpec(kind="mlx", base=str(base), adapter=adapter, device="cpu"))


@pytest.fixture(scope="module")
def backend(make: Callable[[], Any]) -> Iterator[Any]:
    backend = make()
    yield backend
    backend.close()


@pytest.fixture
def fresh(make: Callable[[], Any]) -> Any:
    return make()


class TestMLX(Agreement):
    """In the environment that has mlx."""
