"""The hooks of pytest-sway, for a conftest.py or another plugin to implement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_sway.cache import CachedBackend
    from pytest_sway.scoring import DifferentialBackend
    from pytest_sway.spec import ModelSpec


@pytest.hookspec(firstresult=True)
def pytest_sway_build_backend(spec: ModelSpec, config: pytest.Config) -> DifferentialBackend | None:
    """Build the backend of ``spec``, or return ``None`` to leave it to others and at last to pytest-sway.

    Called once for each load, in the thread that asked. What it returns is leased, evicted and, if it has a
    ``close()``, closed like any other backend. An error that is no `pytest_sway.SwayError` is wrapped in one.

    Args:
        spec: What to load, with device and dtype resolved.
        config: The run's configuration.
    """


def pytest_sway_backend_loaded(cached: CachedBackend, config: pytest.Config) -> None:
    """A backend was loaded; ``cached`` holds it, its spec, its key and the seconds that its load took."""


def pytest_sway_backend_evicted(spec: ModelSpec, config: pytest.Config) -> None:
    """The backend of ``spec`` was closed: to make room, because a test changed it, or at the session's end."""
