from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.tiny import quiet
from tests.unit.backends.hf.conftest import few_objects

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["few_objects"]


@pytest.fixture(autouse=True)
def quiet_libraries() -> Iterator[None]:
    with quiet():
        yield
