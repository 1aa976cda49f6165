"""Import mlx and mlx-lm, and undo what they change in the process."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.libraries.process import quiet_libraries
from pytest_sway.errors import BackendNotAvailableError
from pytest_sway.system.imports import import_apart

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

REQUIRED: Final = ("mlx", "mlx_lm")

_SET_BY_IMPORT: Final = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


def require_libraries(spec: ModelSpec) -> None:
    """Raise unless all libraries of kind ``mlx`` are installed. Import nothing.

    Raises:
        BackendNotAvailableError: A library is missing; the message says how to install it.
    """
    missing = [name.replace("_", "-") for name in REQUIRED if find_spec(name) is None]
    if missing:
        raise BackendNotAvailableError(
            f"loading {spec} needs {' and '.join(missing)}, which this environment lacks."
            " Install them with: pip install 'pytest-sway[mlx]'"
        )


def import_libraries() -> None:
    """Import what a load needs, so that the import does not count as part of the load's time."""
    import_apart("mlx.core", "transformers", "transformers.models.auto.tokenization_auto")  # imports torch, too
    import_apart("mlx_lm", within=_unchanged_process)


def mlx_lm_module(name: str) -> Any:
    """Return ``mlx_lm.<name>``, imported without side effects on the process."""
    if "mlx_lm" not in sys.modules:
        import_libraries()
    return import_module(f"mlx_lm.{name}")


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Keep the import of mlx-lm from changing the process.

    It lowers the limits of open files, including the hard limit, which cannot be raised again. It also sets an
    environment variable, which child processes inherit.
    """
    import resource

    set_limits, variable = resource.setrlimit, os.environ.get(_SET_BY_IMPORT)
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limits
        if variable is None:
            os.environ.pop(_SET_BY_IMPORT, None)


@contextmanager
def quiet_process() -> Iterator[None]:
    """Silence warnings, logs and progress bars of libraries, and restore MLX's random state afterwards."""
    import mlx.core as mx

    with quiet_libraries():
        high, low = mx.random.state[0].tolist()
        try:
            yield
        finally:
            mx.random.seed((high << 32) | low)  # its key is the state from before
