"""The hooks of pytest-sway, for a conftest.py or another plugin to implement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_sway.cache.entries import CachedBackend
    from pytest_sway.protocols import DifferentialBackend
    from pytest_sway.spec.model_spec import ModelSpec


@pytest.hookspec(firstresult=True)
def pytest_sway_build_backend(spec: ModelSpec, config: pytest.Config) -> DifferentialBackend | None:
    """Build the backend of ``spec``, or return ``None`` to leave it to others and at last to pytest-sway.

    Called once for each load, in the thread that asked. An error that is no `pytest_sway.SwayError` is wrapped in one.
    What it returns has ``as_base()`` and ``as_finetuned()``, is leased and evicted like any other, and may have:

    * ``close()``, called once, when it is evicted or the session ends;
    * ``changes()``, the lines that say what about it is not as it was when it was loaded; asked after each test;
    * ``leak()``, asked after the close: ``None``, or an object with ``nbytes``, what is still in memory, and
      ``holders``, lines that say by what it is held;
    * ``sizes()``, the bytes that each of its parts takes, for ``--sway-cache-memory``: a mapping whose keys are equal
      for parts that backends share.

    Args:
        spec: What to load, with device and dtype resolved.
        config: The run's configuration.
    """


def pytest_sway_backend_loaded(cached: CachedBackend, config: pytest.Config) -> None:
    """A backend was loaded; ``cached`` holds it, its spec, its key and the seconds that its load took.

    An error that this raises is reported in the summary and fails no test.
    """


def pytest_sway_backend_evicted(spec: ModelSpec, config: pytest.Config) -> None:
    """The backend of ``spec`` was closed: to make room, because a test changed it, or at the session's end.

    An error that this raises is reported in the summary and fails no test.
    """
