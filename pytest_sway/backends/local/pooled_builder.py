"""`PooledBuilder`: builds backends of models in this process, which share their bases."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pytest_sway.backends.checkpoints.lineage import require_same_base
from pytest_sway.backends.contract import Build
from pytest_sway.backends.local.pool import SharedPool
from pytest_sway.spec.model_kwargs import in_short
from pytest_sway.system.frames import forget_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from pytest_sway.backends.checkpoints.plan import ModelFiles, Plan
    from pytest_sway.backends.local.pool import PoolLease
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


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

    def check(self, spec: ModelSpec) -> Plan:
        """Return the plan for a resolved spec.

        Raises:
            SwayError: Loading it would fail.
        """
        plan = self._checked(spec)
        self._compare_base(plan, "error")
        return plan

    @contextmanager
    def pin(self, plan: Plan) -> Iterator[None]:
        """Keep the models of a plan, if they are loaded, from being closed inside the block."""
        with ExitStack() as held:
            for model in plan.models:
                held.enter_context(self._pool.pin(model.key))
            yield

    def build(self, plan: Plan) -> Any:
        """Load what a plan asks for and is not loaded yet.

        Raises:
            SwayError: It cannot be loaded; the message says why and what to do.
        """
        self._compare_base(plan, "warn")
        shares: list[PoolLease[B]] = []
        handled = sys.exception()
        try:
            return self._assemble(plan, shares)
        except BaseException as error:
            forget_frames(error, handled)
            while shares:
                shares.pop().release()
            raise

    def _compare_base(self, plan: Plan, policy: str) -> None:
        """Tell of an adapter that names another base, once for a load: an error before it, a warning with it."""
        if plan.read is not None and self._on_base_mismatch == policy:
            require_same_base(plan.spec, plan.read.config, policy)

    # --- what a kind does its own way ---------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def _checked(spec: ModelSpec) -> Plan:
        """Check the files of a resolved spec, and return the plan for its load; ``read`` is its adapter's files."""

    @abstractmethod
    def _assemble(self, plan: Plan, shares: list[PoolLease[B]]) -> Any:
        """Load the base, put the adapter on it or load the fine-tuned model, verify that, and make the backend."""

    @abstractmethod
    def _load_base(self, spec: ModelSpec) -> B:
        """Load the base of a spec."""

    @staticmethod
    @abstractmethod
    def _close_base(base: B) -> None:
        """Free a base that nobody uses any more."""

    # --- what a kind needs for that -----------------------------------------------------------------------------------

    def _clean_base(self, model: ModelFiles, shares: list[PoolLease[B]]) -> B:
        """Claim a model of a plan; one that somebody has changed is left to its users, and loaded anew."""
        while True:
            share = self._pool.acquire(model.key, lambda: self._timed(model.spec))
            shares.append(share)
            if share.fresh or not share.value.changes():
                return share.value
            self._pool.withdraw(share.value)
            shares.pop().release()

    def _timed(self, spec: ModelSpec) -> B:
        started = time.perf_counter()
        base = self._load_base(spec)
        if self._on_base_load is not None:
            self._on_base_load(f"{spec.base}{in_short(spec.model_kwargs)}", time.perf_counter() - started)
        return base
