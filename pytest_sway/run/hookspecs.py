"""The hooks that you can implement in a conftest.py or a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_sway.cache.entries import CachedBackend
    from pytest_sway.protocols import DifferentialBackend
    from pytest_sway.spec.model_spec import ModelSpec


@pytest.hookspec(firstresult=True)
def pytest_sway_build_backend(spec: ModelSpec, config: pytest.Config) -> DifferentialBackend | None:
    """Build the backend of ``spec``, or return ``None`` to leave it to other plugins and to pytest-sway.

    Called once for each load, in the thread that asked. An error that is no `pytest_sway.SwayError` is wrapped in one.
    The backend must have ``as_base()`` and ``as_finetuned()``. It is leased and evicted like any other, and may have:

    * ``close()``, called once, when the backend is evicted or the session ends;
    * ``changes()``, called after each test: returns one line for each change since the load;
    * ``leak()``, called after the close: returns ``None``, or an object with ``nbytes``, the bytes still in memory, and
      ``holders``, one line for each chain of references that holds them;
    * ``sizes()``, for ``--sway-cache-memory``: returns a mapping from parts to bytes. Backends that share a part use
      the same key for it.

    Args:
        spec: The spec to load. For kinds hf and mlx, its device and dtype are resolved; for others they may be auto.
        config: The run's configuration.
    """


def pytest_sway_backend_loaded(cached: CachedBackend, config: pytest.Config) -> None:
    """Called after a load; ``cached`` holds the backend, its spec, its key and the seconds of its load.

    An error raised here is reported in the summary and fails no test.
    """


def pytest_sway_backend_evicted(spec: ModelSpec, config: pytest.Config) -> None:
    """Called after a close: to make room, because a test changed the backend, or at the session's end.

    An error raised here is reported in the summary and fails no test.
    """
