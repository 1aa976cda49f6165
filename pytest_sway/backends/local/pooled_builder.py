"""`PooledBuilder`: build backends of models in this process, which share their bases."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pytest_sway.backends.checkpoints.hub.locator import Locator
from pytest_sway.backends.checkpoints.hub.refusals import explained_model
from pytest_sway.backends.checkpoints.lineage import require_same_base
from pytest_sway.backends.contract import Build
from pytest_sway.backends.local.pool import SharedPool
from pytest_sway.spec.identity import forget_look
from pytest_sway.spec.model_kwargs import in_short
from pytest_sway.system.garbage import forget_frames, no_full_collections

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from pytest_sway.backends.checkpoints.plan import ModelFiles, Plan
    from pytest_sway.backends.local.pool import PoolLease
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


class Recorded(Protocol):
    """Something that detects changes to itself, such as a loaded base."""

    def changes(self) -> list[str]:
        """Return one line for each change to what all its users share."""
        ...


B = TypeVar("B", bound=Recorded)


class PooledBuilder(Build, ABC, Generic[B]):
    """Builds backends of one kind, which share a base if their specs agree on it.

    Args:
        on_base_load: Called after each load of a base, with the base's name and the seconds that the load took.
        on_base_mismatch: What happens if an adapter names another base: ``error``, ``warn`` or ``ignore``.
        located: Finds a spec's adapter and base on this machine; by default, one of its own.
    """

    def __init__(
        self,
        on_base_load: Callable[[str, float], None] | None = None,
        *,
        on_base_mismatch: str = "warn",
        located: Callable[[ModelSpec], ModelSpec] | None = None,
    ) -> None:
        self._on_base_load = on_base_load
        self._on_base_mismatch = on_base_mismatch
        self._located = located or Locator()
        self._pool: SharedPool[Hashable, B] = SharedPool(close=self._close_base)

    def located(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with its adapter as a folder and its base named.

        Raises:
            SwayError: They cannot be found.
        """
        return self._located(spec)

    def check(self, spec: ModelSpec) -> Plan:
        """Return the plan for a resolved spec.

        Raises:
            SwayError: The spec cannot be loaded.
        """
        located = self.located(spec)
        forget_look(located)  # the key after a check, passed or not, is of the files that the check has read
        plan = self._checked(located)
        self._compare_base(plan, "error")
        return plan

    @contextmanager
    def pin(self, plan: Plan) -> Iterator[None]:
        """Keep the plan's loaded models from being closed inside the block."""
        with ExitStack() as held:
            for model in plan.models:
                held.enter_context(self._pool.pin(model.key))
            yield

    def build(self, plan: Plan) -> Any:
        """Load what a plan describes, except for models that are loaded already.

        Raises:
            SwayError: It cannot be loaded; the message says why and what to do.
        """
        self._compare_base(plan, "warn")
        shares: list[PoolLease[B]] = []
        handled = sys.exception()
        try:
            with no_full_collections():
                return self._assemble(plan, shares)
        except BaseException as error:
            forget_frames(error, handled)
            while shares:
                shares.pop().release()
            raise

    def _compare_base(self, plan: Plan, policy: str) -> None:
        """Report an adapter that names another base once for a load: as an error before it, or a warning with it."""
        if plan.read is None or self._on_base_mismatch != policy:
            return
        base = next(model for model in reversed(plan.models) if not model.merged)
        merged = [files for model in plan.models for files in model.merged]
        for number, files in enumerate((*merged, plan.read)):
            require_same_base(base.spec, files.folder, files.config, policy, merged=number > 0)

    # --- implemented by each kind -------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def _checked(spec: ModelSpec) -> Plan:
        """Check the files of a resolved spec and return its plan, with the adapter's files in ``read``."""

    @abstractmethod
    def _assemble(self, plan: Plan, shares: list[PoolLease[B]]) -> Any:
        """Load the base and the adapter or the fine-tuned model, verify them, and make the backend."""

    @abstractmethod
    def _load_base(self, spec: ModelSpec) -> B:
        """Load the base of a spec."""

    @staticmethod
    @abstractmethod
    def _close_base(base: B) -> None:
        """Free a base without users."""

    # --- used by each kind --------------------------------------------------------------------------------------------

    def _clean_base(self, model: ModelFiles, shares: list[PoolLease[B]]) -> B:
        """Claim a model of a plan. A changed one is left to its users and loaded anew."""
        return self._claimed(model.key, shares, lambda: self._timed(model.spec), lambda base: not base.changes())

    def _claimed(
        self, key: Hashable, shares: list[PoolLease[B]], load: Callable[[], B], is_usable: Callable[[B], bool]
    ) -> B:
        """Claim a value of the pool. One that is not usable is left to its users and made anew."""
        while True:
            share = self._pool.acquire(key, load)
            shares.append(share)
            if share.fresh or is_usable(share.value):
                return share.value
            self._pool.withdraw(share.value)
            shares.pop().release()

    def _timed(self, spec: ModelSpec) -> B:
        started = time.perf_counter()
        with explained_model(spec):
            base = self._load_base(spec)
        if self._on_base_load is not None:
            self._on_base_load(self._name_of(base, spec), time.perf_counter() - started)
        return base

    def _name_of(self, _base: B, spec: ModelSpec) -> str:
        """Return a loaded base's name in the summary."""
        return f"{spec.base}{in_short(spec.model_kwargs, spec.task)}"
