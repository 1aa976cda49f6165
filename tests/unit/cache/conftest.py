"""Fixtures of fake builds for the tests of the cache."""

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
    """Disable periodic looks, so that a thread that nobody wakes fails its test."""
    monkeypatch.setattr("pytest_sway.cache.backend_cache._GLANCE", 10 * DEADLINE)
