"""The builds that the tests of the cache load with."""

from __future__ import annotations

import pytest

from tests.unit.fakes import FakeBuild, InformedFakeBuild


@pytest.fixture
def build() -> FakeBuild:
    return FakeBuild()


@pytest.fixture
def sharing() -> InformedFakeBuild:
    return InformedFakeBuild()
