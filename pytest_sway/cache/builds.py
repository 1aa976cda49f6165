"""What a cache builds with, and whom it tells."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.contract import Build
from pytest_sway.backends.registry import Builder, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.backends.checkpoints.plan import Plan
    from pytest_sway.cache.entries import CachedBackend
    from pytest_sway.spec.model_spec import ModelSpec


class Listener:
    """Who is told of loads and closes, in the thread that does them and outside the lock; deaf unless overridden."""

    def loading(self, spec: ModelSpec) -> AbstractContextManager[None]:  # noqa: ARG002 # for those who override it
        """A load begins; the block lasts as long as the load."""
        return nullcontext()

    def leased(self, cached: CachedBackend) -> None:
        """A lease was granted."""

    def loaded(self, cached: CachedBackend) -> None:
        """A load succeeded."""

    def evicted(self, cached: CachedBackend) -> None:
        """A backend was closed, for whatever reason."""


def informed(build: Callable[..., Any] | None) -> Build:
    """Return ``build`` if it is a `Build`, else one that calls it; by default, a new `Builder`."""
    if build is None:
        return Builder()
    return build if isinstance(build, Build) else _Plain(build)


class _Plain(Build):
    """Stands for a function that makes backends."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def resolve(self, spec: ModelSpec) -> ModelSpec:
        return resolve(spec)

    def build(self, plan: Plan) -> Any:
        return self._build(plan.spec)
