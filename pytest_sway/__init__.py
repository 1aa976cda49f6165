"""pytest-sway: base model and fine-tuned model as two views on one set of loaded weights, in pytest.

pytest imports this package at every start, so each public name is imported on first use.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_sway.backends.registry import cache_key_for
    from pytest_sway.cache.backend_cache import BackendCache
    from pytest_sway.cache.entries import CachedBackend, Lease
    from pytest_sway.comparison.comparison import Comparison
    from pytest_sway.errors import SwayError, SwayWarning
    from pytest_sway.protocols import (
        BatchView,
        Chat,
        Classification,
        DifferentialBackend,
        Message,
        NullCalibratedBackend,
        Prompt,
        RawView,
        RollingLogprob,
        ScalableDifferentialBackend,
        TokenDist,
        View,
    )
    from pytest_sway.run.regression.comparing import SwayCompare
    from pytest_sway.run.serving.requests import SwayBackend
    from pytest_sway.spec.model_spec import ModelSpec
    from pytest_sway.spec.training_runs import checkpoints

__all__ = [
    "BackendCache",
    "BatchView",
    "CachedBackend",
    "Chat",
    "Classification",
    "Comparison",
    "DifferentialBackend",
    "Lease",
    "Message",
    "ModelSpec",
    "NullCalibratedBackend",
    "Prompt",
    "RawView",
    "RollingLogprob",
    "ScalableDifferentialBackend",
    "SwayBackend",
    "SwayCompare",
    "SwayError",
    "SwayWarning",
    "TokenDist",
    "View",
    "cache_key_for",
    "checkpoints",
]

__version__: str


class Finder:
    """Finds this package's modules before pytest does, which would rewrite their assertions.

    pytest reads a rewritten module's bytecode in many small pieces, and takes twice as long for the 160 modules behind
    a backend. Each run of pytest has a finder of its own.
    """

    def insert(self) -> None:
        """Take the place before pytest's own finder, so that those of other tools still come first."""
        for place, finder in enumerate(sys.meta_path):
            if type(finder).__name__ == "AssertionRewritingHook":
                sys.meta_path.insert(place, self)
                return

    def remove(self) -> None:
        """Leave that place, if nobody else has emptied it."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the module's spec; ``None`` for those of other packages."""
        return PathFinder.find_spec(name, path, target) if name.startswith("pytest_sway.") else None


Finder().insert()  # for the plugin's module, which removes it

_HOMES = {
    "backends.registry": ("cache_key_for",),
    "cache.backend_cache": ("BackendCache",),
    "cache.entries": ("CachedBackend", "Lease"),
    "comparison.comparison": ("Comparison",),
    "errors": ("SwayError", "SwayWarning"),
    "protocols": (
        "BatchView",
        "Chat",
        "Classification",
        "DifferentialBackend",
        "Message",
        "NullCalibratedBackend",
        "Prompt",
        "RawView",
        "RollingLogprob",
        "ScalableDifferentialBackend",
        "TokenDist",
        "View",
    ),
    "run.regression.comparing": ("SwayCompare",),
    "run.serving.requests": ("SwayBackend",),
    "spec.model_spec": ("ModelSpec",),
    "spec.training_runs": ("checkpoints",),
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it, or read the installed package's version."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pytest-sway")
        except PackageNotFoundError:
            raise AttributeError("pytest-sway is not installed, so it has no version") from None
    for module, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            return getattr(import_module(f"pytest_sway.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
