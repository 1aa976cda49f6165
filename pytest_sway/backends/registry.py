"""From a spec to a live backend: one module or package per kind, imported when the kind is first asked for.

`Builder` is what the cache builds with. It keeps what the backends of a kind share, such as the loaded bases.
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
from pytest_sway.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.protocols import DifferentialBackend


__tracebackhide__ = True

BUILDERS: Final = {
    "hf": "pytest_sway.backends.hf.builder:HFBuilder",
    "mlx": "pytest_sway.backends.mlx.builder:MLXBuilder",
    "api": "pytest_sway.backends.api.builder:ApiBuilder",
    "dummy": "pytest_sway.backends.dummy.backend:DummyBuilder",
    "custom": "pytest_sway.backends.custom:CustomBuilder",
}
"""What builds each kind: a `Build`, whose module is imported when the kind is first asked for.

It is made with those of `Builder`'s options that it has parameters for.
"""

_UNCHECKED: Final = object()
"""What is in the plan of a spec that pytest-sway refuses, and a hook may take."""


def resolve(spec: ModelSpec, *, device: str = "auto", dtype: str = "auto") -> ModelSpec:
    """Return ``spec`` with the device and dtype that ``auto`` stands for.

    Args:
        spec: Any spec.
        device: What ``auto`` means for devices; itself ``auto`` for the best that the machine has.
        dtype: What ``auto`` means for dtypes; itself ``auto`` for the best that the device computes.
    """
    if spec.device == "auto" and device != "auto":
        spec = replace(spec, device=device)
    if spec.dtype == "auto" and dtype != "auto":
        spec = replace(spec, dtype=dtype)  # type: ignore[arg-type] # checked by ModelSpec itself
    return _builder_class(spec.kind).placed(spec)


class BuildHooks(Protocol):
    """The user's part in building backends."""

    def build(self, spec: ModelSpec) -> Any | None:
        """Return a backend, or ``None`` to leave it to pytest-sway."""
        ...

    def builds(self) -> bool:
        """Whether anybody implements `build`."""
        ...


class Builder(Build):
    """Builds backends of every kind and keeps what they share.

    Args:
        hooks: Who is asked first for each backend, by the hook ``pytest_sway_build_backend``.
        device: What ``auto`` means for devices in this run.
        dtype: What ``auto`` means for dtypes in this run.
        on_base_load: Called with the base's name and the seconds that it took, whenever a base was loaded.
        share_weights: A folder through which this process and others on this host hold one copy of converted weights;
            ``None`` for a copy of its own.
        score_cache: The most bytes of answers that each base of kind ``hf`` remembers; 0 for none.
        on_recall: Called with a base's name, how many answers it gave from memory, and the seconds they once took.
        on_base_mismatch: What an adapter gets that names another base: ``error``, ``warn`` or ``ignore``.
        fetching: Shows what is being fetched from a hub, as long as the block lasts.
        on_fetch: Called with what was looked for on a hub, the bytes that were fetched, and the seconds that took.
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
        """Return the plan for a resolved spec; where a hook may build what pytest-sway refuses, one that says nothing.

        Raises:
            SwayError: Loading it would fail.
        """
        try:
            return self._builder(spec).check(spec)
        except SwayError:
            if self._hooks is None or not self._hooks.builds():
                raise
            return replace(Plan.of(spec), read=_UNCHECKED)

    def pin(self, plan: Plan) -> AbstractContextManager[None]:
        """Keep what a plan shares with others from being closed while room is made for it."""
        return self._builder(plan.spec).pin(plan)

    def build(self, plan: Plan) -> DifferentialBackend:
        """Build the backend of a plan, by the hook if it takes it."""
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
            self._builders.setdefault(spec.kind, made_by(**options))  # another thread may have been here, too
        return self._builders[spec.kind]


@cache
def _builder_class(kind: str) -> type[Build]:
    module, _, name = BUILDERS[kind].partition(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return] # as the table says


def cache_key_for(spec: ModelSpec, *, adapter_path: Path | None = None) -> Key:
    """Return the identity of what ``spec`` loads.

    The key begins ``(kind, base, str(adapter) or None, dtype, device)``, with the device and dtype that ``auto`` stands
    for on this machine; asking that imports torch when the kind needs it and it is installed. It goes on with every
    other field that changes what is loaded, and with the state of the files. An adapter on a hub is fetched for it.

    Args:
        spec: What is asked for.
        adapter_path: An adapter that takes the place of the spec's own.
    """
    return resolved_key(Builder().resolve(with_adapter(spec, adapter_path)))
