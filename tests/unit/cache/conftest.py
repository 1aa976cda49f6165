"""The builds that the tests of the cache load with."""

from __future__ import annotations

import pytest

from tests.unit.fakes import DEADLINE, FakeBuild, InformedFakeBuild


@pytest.fixture
def build() -> FakeBuild:
    return FakeBuild()


@pytest.fixture
def sharing() -> InformedFakeBuild:
    return InformedFakeBuild()


@pytest.fixture(autouse=True)
def _nobody_glances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not woken stays asleep, and its test fails."""
    monkeypatch.setattr("pytest_sway.cache.backend_cache._GLANCE", 10 * DEADLINE)
