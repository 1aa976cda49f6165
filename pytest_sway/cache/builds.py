"""The `Build` that a cache uses, and the `Listener` that it notifies."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.contract import Build
from pytest_sway.backends.registry import Builder, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.backends.checkpoints.plan import Plan
    from pytest_sway.cache.entries import CachedBackend
    from pytest_sway.cache.owners import Owner
    from pytest_sway.spec.model_spec import ModelSpec


class Listener:
    """Callbacks for loads and closes, called in the thread that loads or closes, outside the lock.

    Each does nothing unless a subclass overrides it.
    """

    def loading(self, spec: ModelSpec) -> AbstractContextManager[None]:  # noqa: ARG002 # subclasses use it
        """Called when a load begins; the block lasts as long as the load."""
        return nullcontext()

    def leased(self, cached: CachedBackend, owner: Owner) -> None:
        """Called when a backend was given to an owner."""

    def loaded(self, cached: CachedBackend) -> None:
        """Called when a load succeeded."""

    def evicted(self, cached: CachedBackend) -> None:
        """Called when a backend was closed, for any reason."""


def informed(build: Callable[..., Any] | None) -> Build:
    """Return ``build`` if it is a `Build`, else a `Build` that calls it; a new `Builder` for ``None``."""
    if build is None:
        return Builder()
    return build if isinstance(build, Build) else _Plain(build)


class _Plain(Build):
    """A `Build` that calls a plain function."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def resolve(self, spec: ModelSpec) -> ModelSpec:
        return resolve(spec)

    def build(self, plan: Plan) -> Any:
        return self._build(plan.spec)
