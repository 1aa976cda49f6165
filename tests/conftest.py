"""Fixtures of tiny models, made on first use."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    """The names of the loaded bases, in order."""
    return []
