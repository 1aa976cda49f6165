"""What a cache builds with, and whom it tells: the Protocols of its two neighbours."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.cache.entries import CachedBackend, Parts
    from pytest_sway.spec.model_spec import ModelSpec


class Build(Protocol):
    """What makes a backend of a spec; any such callable is enough."""

    def __call__(self, spec: ModelSpec, /, *, adapter_path: Path | None = None) -> Any:
        """Load what ``spec`` describes."""
        ...


class InformedBuild(Build, Protocol):
    """A build that also answers the cache's questions; it gets the specs that its `resolve` returned."""

    def resolve(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with the device and dtype that ``auto`` stands for."""
        ...

    def check(self, spec: ModelSpec) -> None:
        """Raise what can be known to fail, before anything is evicted for it."""
        ...

    def estimate(self, spec: ModelSpec) -> Parts | None:
        """Return the bytes that a load would take, or ``None``."""
        ...

    def measure(self, backend: Any) -> Parts | None:
        """Return the bytes that a backend takes, or ``None``."""
        ...

    def hold(self, spec: ModelSpec) -> AbstractContextManager[None]:
        """Keep what the load will share from being closed while room is made."""
        ...

    def exhausted(self, error: Exception) -> bool:
        """Return whether a load failed because the memory ran out, so that it is worth another try with more."""
        ...


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


_QUESTIONS: Final = ("resolve", "check", "estimate", "measure", "hold", "exhausted")


def informed(build: Build | None) -> InformedBuild:
    """Return ``build`` with the questions answered that it does not answer itself; by default, a new `Builder`."""
    if build is None:
        from pytest_sway.backends.registry import Builder

        return Builder()
    answered = [question for question in _QUESTIONS if hasattr(type(build), question)]
    if len(answered) == len(_QUESTIONS):
        return cast("InformedBuild", build)
    plain = _Plain(build)
    for question in answered:
        setattr(plain, question, getattr(build, question))
    return plain


class _Plain:
    """The answers for a build that has none: nothing is known before the load."""

    def __init__(self, build: Build) -> None:
        self._build = build

    def __call__(self, spec: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        return self._build(spec, adapter_path=adapter_path)

    def resolve(self, spec: ModelSpec) -> ModelSpec:
        from pytest_sway.backends.registry import resolve

        return resolve(spec)

    def check(self, spec: ModelSpec) -> None:
        pass

    def estimate(self, spec: ModelSpec) -> Parts | None:  # noqa: ARG002
        return None

    def measure(self, backend: Any) -> Parts | None:  # noqa: ARG002
        return None

    def hold(self, spec: ModelSpec) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def exhausted(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)
