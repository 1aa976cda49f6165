"""Fixtures of the mlx backend's tests, which only ``tox -e mlx`` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.registry import Builder
from pytest_sway.spec.model_spec import ModelSpec


@pytest.fixture
def build(loads: list[str]) -> Iterator[Callable[..., Any]]:
    """Build a backend, by default of kind ``mlx``; it is closed after the test."""
    builder = Builder(on_base_load=lambda name, seconds: loads.append(name))
    built: list[Any] = []

    def _build(base: Path, adapter: Path | None = None, **fields: Any) -> Any:
        built.append(builder(ModelSpec(**({"kind": "mlx", "device": "cpu"} | fields), base=str(base), adapter=adapter)))
        return built[-1]

    yield _build
    for backend in built:
        backend.close()
