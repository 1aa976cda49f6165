"""Select the builder of a spec's kind, and import it when that kind is first asked for.

The cache builds with `Builder`. It keeps what the backends of a kind share, such as loaded bases.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from pytest_sway.backends.checkpoints.hub.locator import Fetching, Locator, OnFetch
from pytest_sway.backends.checkpoints.plan import Plan
from pytest_sway.backends.contract import Build, require_differential
from pytest_sway.errors import SwayError
from pytest_sway.spec.identity import Key, resolved_key, with_adapter
from pytest_sway.spec.kinds import KINDS
from pytest_sway.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.protocols import DifferentialBackend


__tracebackhide__ = True

_UNCHECKED: Final = object()
"""Marks the plan of a spec that pytest-sway refuses and a hook may build."""


def resolve(spec: ModelSpec, *, device: str = "auto", dtype: str = "auto") -> ModelSpec:
    """Return ``spec`` with the device and dtype that ``auto`` stands for.

    Args:
        spec: Any spec.
        device: The device for ``auto``; itself ``auto`` for the best one of the machine.
        dtype: The dtype for ``auto``; itself ``auto`` for the best one of the device.
    """
    if spec.device == "auto" and device != "auto":
        spec = replace(spec, device=device)
    if spec.dtype == "auto" and dtype != "auto":
        spec = replace(spec, dtype=dtype)  # type: ignore[arg-type] # checked by ModelSpec itself
    return _builder_class(spec.kind).placed(spec)


class BuildHooks(Protocol):
    """Hooks by which users build backends."""

    def build(self, spec: ModelSpec) -> Any | None:
        """Return a backend, or ``None`` to let pytest-sway build it."""
        ...

    def builds(self) -> bool:
        """Return whether any plugin implements `build`."""
        ...


class Builder(Build):
    """Builds backends of every kind and keeps what they share.

    Args:
        hooks: Asked first for each backend, by the hook ``pytest_sway_build_backend``.
        device: The device for ``auto`` in this run.
        dtype: The dtype for ``auto`` in this run.
        on_base_load: Called after each load of a base, with the base's name and the seconds that the load took.
        share_weights: A folder through which the processes on this host share one copy of converted weights; ``None``
            for a copy of its own.
        score_cache: The most bytes of answers that are cached for each base of kind ``hf``; 0 for none.
        on_recall: Called with a base's name, the number of its cached answers that were used, and the seconds they
            saved.
        on_base_mismatch: What happens if an adapter names another base: ``error``, ``warn`` or ``ignore``.
        fetching: Shows a fetch from a hub for as long as its block lasts.
        on_fetch: Called after a fetch from a hub with the adapter's name, the bytes and the seconds.
    """

    def __init__(  # noqa: PLR0913 # all that a run can say
        self,
        *,
        hooks: BuildHooks | None = None,
        device: str = "auto",
        dtype: str = "auto",
        on_base_load: Callable[[str, float], None] | None = None,
        share_weights: Path | None = None,
        score_cache: int = 64 * 2**20,
        on_recall: Callable[[str, int, float], None] | None = None,
        on_base_mismatch: str = "warn",
        fetching: Fetching | None = None,
        on_fetch: OnFetch | None = None,
    ) -> None:
        self._hooks = hooks
        self._device = device
        self._dtype = dtype
        self._options: dict[str, Any] = {
            "on_base_load": on_base_load,
            "share_weights": share_weights,
            "score_cache": score_cache,
            "on_recall": on_recall,
            "on_base_mismatch": on_base_mismatch,
            "located": Locator(fetching, on_fetch),
        }
        self._builders: dict[str, Build] = {}

    def resolve(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` as it will be loaded: on a device, in a dtype, from folders on this machine.

        Raises:
            SwayError: Its adapter or base cannot be found, and no hook may build it all the same.
        """
        placed = resolve(spec, device=self._device, dtype=self._dtype)
        try:
            return self._builder(placed).located(placed)
        except SwayError:
            if self._hooks is None or not self._hooks.builds():
                raise
            return placed

    def check(self, spec: ModelSpec) -> Plan:
        """Return the plan for a resolved spec; an empty one for a spec that fails the check but that a hook may build.

        Raises:
            SwayError: The spec cannot be loaded, and there is no hook.
        """
        try:
            return self._builder(spec).check(spec)
        except SwayError:
            if self._hooks is None or not self._hooks.builds():
                raise
            return replace(Plan.of(spec), read=_UNCHECKED)

    def pin(self, plan: Plan) -> AbstractContextManager[None]:
        """Keep the parts that a plan shares from being closed while models are evicted for it."""
        return self._builder(plan.spec).pin(plan)

    def build(self, plan: Plan) -> DifferentialBackend:
        """Build a plan's backend; ask the hook first."""
        built = None if self._hooks is None else self._hooks.build(plan.spec)
        if built is not None:
            return require_differential(built, "the hook pytest_sway_build_backend")
        builder = self._builder(plan.spec)
        backend: DifferentialBackend = builder.build(builder.check(plan.spec) if plan.read is _UNCHECKED else plan)
        return backend

    def _builder(self, spec: ModelSpec) -> Build:
        if spec.kind not in self._builders:
            made_by = _builder_class(spec.kind)
            options = {name: self._options[name] for name in signature(made_by).parameters if name in self._options}
            self._builders.setdefault(spec.kind, made_by(**options))  # another thread may have made it meanwhile
        return self._builders[spec.kind]


@cache
def _builder_class(kind: str) -> type[Build]:
    module, _, name = KINDS[kind].builder.partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return] # as `KINDS` says


def cache_key_for(spec: ModelSpec, *, adapter_path: Path | None = None) -> Key:
    """Return the cache key of ``spec``.

    It begins with ``(kind, base, str(adapter) or None, dtype, device)``; a list of adapters is a tuple of their names.
    ``auto`` is resolved for this machine, which imports torch if the kind needs it and it is installed. The rest of the
    key is every other field that changes what is loaded, and the state of the files. An adapter on a hub is fetched for
    it.

    Args:
        spec: What is asked for.
        adapter_path: An adapter that replaces the spec's own.
    """
    return resolved_key(Builder().resolve(with_adapter(spec, adapter_path)))
