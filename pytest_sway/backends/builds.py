"""`Build`: what makes backends, and what the cache asks of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.exhaustion import out_of_memory
from pytest_sway.spec import with_adapter

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from pathlib import Path

    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class Build:
    """Makes backends of specs, and answers the cache's questions about them.

    Override `build`, and the questions that you know more about: the answers here are those where nothing is known
    before the load. All but `resolve` get specs that `resolve` returned.
    """

    def __call__(self, spec: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        """Load what ``spec`` describes.

        Args:
            spec: Any spec.
            adapter_path: An adapter that takes the place of the spec's own.
        """
        return self.build(self.resolve(with_adapter(spec, adapter_path)))

    def build(self, spec: ModelSpec) -> Any:
        """Load what a resolved spec describes and is not loaded yet.

        Raises:
            SwayError: It cannot be loaded; the message says why and what to do.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither build() nor __call__() of its own: {spec}")

    def resolve(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with the device and dtype that it will be loaded with."""
        return self.placed(spec)

    @staticmethod
    def placed(spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with the device and dtype that ``auto`` stands for on this machine."""
        return spec

    def check(self, spec: ModelSpec) -> None:
        """Find what can be found wrong with a spec without loading it, before anything is evicted for it.

        Raises:
            SwayError: Loading it would fail.
        """

    def estimate(self, spec: ModelSpec) -> Mapping[Hashable, int] | None:  # noqa: ARG002 # for those who override it
        """Return the bytes that each part of a spec will take, or ``None`` if that cannot be known.

        Parts that several backends share, such as a base, have equal keys, and count once.
        """
        return None

    def measure(self, backend: Any) -> Mapping[Hashable, int] | None:
        """Return the bytes that each part of a loaded backend takes, keyed as in `estimate`."""
        sizes = getattr(backend, "sizes", None)
        return sizes() if callable(sizes) else None

    def hold(self, spec: ModelSpec) -> AbstractContextManager[None]:  # noqa: ARG002 # for those who override it
        """Keep what a spec will share with others from being closed while room is made for it."""
        return nullcontext()

    def exhausted(self, error: Exception) -> bool:
        """Return whether a load failed because memory ran out, so that it is worth another try with more."""
        return out_of_memory(error)
