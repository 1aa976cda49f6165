"""`PooledBuilder`: builds backends of models in this process, which share their bases."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pytest_sway.backends.contract import Build
from pytest_sway.backends.local.pool import SharedPool
from pytest_sway.spec.identity import base_key, finetuned_spec
from pytest_sway.system.frames import forget_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from pytest_sway.backends.local.pool import Share
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class Recorded(Protocol):
    """What knows whether it is still what it was, such as a loaded base."""

    def changes(self) -> list[str]:
        """One line for each thing that all of its users share and that is no longer as it was."""
        ...


B = TypeVar("B", bound=Recorded)


class PooledBuilder(Build, ABC, Generic[B]):
    """Builds backends of one kind; those whose specs agree on the base share it.

    Args:
        on_base_load: Called with the base's name and the seconds that it took, whenever a base was loaded.
        on_base_mismatch: What an adapter gets that names another base: ``error``, ``warn`` or ``ignore``.
    """

    def __init__(
        self, on_base_load: Callable[[str, float], None] | None = None, *, on_base_mismatch: str = "warn"
    ) -> None:
        self._on_base_load = on_base_load
        self._on_base_mismatch = on_base_mismatch
        self._pool: SharedPool[Hashable, B] = SharedPool(close=self._close_base)

    def build(self, spec: ModelSpec) -> Any:
        """Load what ``spec`` asks for and is not loaded yet.

        Raises:
            SwayError: It cannot be loaded; the message says why and what to do.
        """
        spec = self.resolve(spec)
        plan = self._planned(spec)
        shares: list[Share[B]] = []
        handled = sys.exception()
        try:
            return self._assemble(spec, plan, shares)
        except BaseException as error:
            forget_frames(error, handled)
            while shares:
                shares.pop().release()
            raise

    @contextmanager
    def hold(self, spec: ModelSpec) -> Iterator[None]:
        """Keep the bases of ``spec``, if they are loaded, from being closed inside the block."""
        spec = self.resolve(spec)
        tuned = finetuned_spec(spec)
        with (
            self._pool.hold(base_key(spec)),
            nullcontext() if tuned is None else self._pool.hold(base_key(tuned)),
        ):
            yield

    # --- what a kind does its own way ---------------------------------------------------------------------------------

    @abstractmethod
    def _planned(self, spec: ModelSpec) -> Any:
        """Check a spec for its load, and return what its files say."""

    @abstractmethod
    def _assemble(self, spec: ModelSpec, plan: Any, shares: list[Share[B]]) -> Any:
        """Load the base, put the adapter on it or load the fine-tuned model, verify that, and make the backend."""

    @abstractmethod
    def _load_base(self, spec: ModelSpec) -> B:
        """Load the base of a spec."""

    @staticmethod
    @abstractmethod
    def _close_base(base: B) -> None:
        """Free a base that nobody uses any more."""

    # --- what a kind needs for that -----------------------------------------------------------------------------------

    def _clean_base(self, spec: ModelSpec, shares: list[Share[B]]) -> B:
        """Claim the base of ``spec``; one that somebody has changed is left to its users, and loaded anew."""
        while True:
            share = self._pool.acquire(base_key(spec), lambda: self._timed(spec))
            shares.append(share)
            if share.fresh or not share.value.changes():
                return share.value
            self._pool.withdraw(share.value)
            shares.pop().release()

    def _timed(self, spec: ModelSpec) -> B:
        started = time.perf_counter()
        base = self._load_base(spec)
        if self._on_base_load is not None:
            self._on_base_load(spec.base, time.perf_counter() - started)
        return base
