"""`SwaySession`: one run's cache, without pytest's hooks. `open_session` opens it when a test first asks for a backend.

It tells the user's hooks, the summary and the run's `Hygiene` of loads and closes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from pytest_sway.backends.registry import Builder, BuildHooks
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.builds import Listener
from pytest_sway.cache.entries import CachedBackend
from pytest_sway.cache.owners import Owner
from pytest_sway.errors import ends_run
from pytest_sway.run.controller import load_progress, weights_folder
from pytest_sway.run.named_specs import named_specs
from pytest_sway.run.registering import registered
from pytest_sway.run.serving.hygiene import Hygiene
from pytest_sway.run.serving.requests import Requests
from pytest_sway.run.serving.secrets import SecretsHidden
from pytest_sway.run.settings import asks_for_reports
from pytest_sway.spec.identity import adapter_digest_in, look_again
from pytest_sway.spec.model_kwargs import in_short
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.paths import short_name
from pytest_sway.system.imports import import_seconds, keep_modules
from pytest_sway.system.machine import device_names, imported_versions
from pytest_sway.system.redaction import redacted
from pytest_sway.system.wording import format_bytes

if TYPE_CHECKING:
    from pathlib import Path
    from typing import TextIO

    import pytest

    from pytest_sway.cache.stats import SwayStats
    from pytest_sway.errors import MutationError
    from pytest_sway.report.progress import LoadProgress
    from pytest_sway.run.settings import SwaySettings

__tracebackhide__ = True


_PATIENCE_AT_END: Final = 3.0
"""Seconds that the end of a session waits for loads in progress. pytest-xdist kills a worker after ten seconds, and
five of them may pass before the worker hears of an interrupt."""


class Hooks(BuildHooks, Protocol):
    """The hooks ``pytest_sway_*``, without pytest."""

    def loaded(self, cached: CachedBackend) -> None:
        """Call ``pytest_sway_backend_loaded``."""
        ...

    def evicted(self, spec: ModelSpec) -> None:
        """Call ``pytest_sway_backend_evicted``."""
        ...


class SwaySession(Listener):
    """The cache and the checks of one run.

    Args:
        settings: The settings of the run.
        hooks: The user's hooks.
        named: Specs by name.
        progress: Shows slow loads.
        owner: Returns the test or fixture that runs now. It owns the leases that are not taken by ``sway_backend``.
        share_weights: A folder for converted weights that the workers of this machine share.
        recorded: Whether the run writes a record, which names versions and hardware.

    Attributes:
        cache: The cache.
        requests: The tests' requests of backends.
        hygiene: The checks of backends.
    """

    def __init__(
        self,
        settings: SwaySettings,
        hooks: Hooks,
        named: Mapping[str, Any],
        progress: LoadProgress,
        owner: Callable[[], Owner],
        share_weights: Path | None = None,
        recorded: bool = True,
    ) -> None:
        self._recorded = recorded
        self._hooks = hooks
        self._progress = progress
        self._loaded: dict[ModelSpec, str | None] = {}
        self._unreported = deque[float]()
        self._seconds_before = import_seconds()
        builder = Builder(
            hooks=hooks,
            device=settings.device,
            dtype=settings.dtype,
            on_base_load=self._base_loaded,
            share_weights=share_weights,
            score_cache=settings.score_cache,
            on_recall=self._recalled,
            on_base_mismatch=settings.on_base_mismatch,
            fetching=progress.loading,
            on_fetch=self._fetched,
        )
        self.cache = BackendCache(
            settings.cache_size,
            max_bytes=settings.cache_memory,
            build=builder,
            named=named,
            listener=self,
            owner=owner,
            remedy=f"raise --sway-cache-size (now {settings.cache_size}) or --sway-cache-memory",
        )
        self.requests = Requests(self.cache)
        self.hygiene = Hygiene(self.cache, settings)

    @property
    def stats(self) -> SwayStats:
        """The counts so far."""
        return self.cache.stats

    def end_test(self, owner: Owner) -> MutationError | None:
        """End a test's leases, and check the backends leased during it.

        Call it when the test and its own fixtures have ended, so that they may undo their changes.

        Returns:
            The error for the test, if it left changes and they are errors.
        """
        look_again()
        self.cache.end(owner)
        self.cache.note_hits()
        return self.hygiene.end_test(owner.name)

    # --- loads and closes ---------------------------------------------------------------------------------------------

    @contextmanager
    def loading(self, spec: ModelSpec) -> Iterator[None]:
        """Show a slow load."""
        with self._progress.loading(str(spec)):
            yield

    def leased(self, cached: CachedBackend, owner: Owner) -> None:
        """Note that the running test or its fixtures use a backend."""
        self.hygiene.leased(cached, owner.name)

    def loaded(self, cached: CachedBackend) -> None:
        """Count the seconds of a load apart from the test, and tell the user's hook."""
        spec = cached.model_spec
        if spec.kind in ("hf", "mlx"):  # the kinds that share bases
            self.stats.backend(str(spec)).base = short_name(f"{spec.base}{in_short(spec.model_kwargs, spec.task)}")
        self._loaded[spec] = adapter_digest_in(cached.key)
        self._unreported.append(cached.load_seconds)
        with self._noted("pytest_sway_backend_loaded", cached):
            self._hooks.loaded(cached)

    def evicted(self, cached: CachedBackend) -> None:
        """Look for a leak, and tell the user's hook."""
        with self._noted("looking for leaks", cached):
            self.hygiene.closed(cached)
        with self._noted("pytest_sway_backend_evicted", cached):
            self._hooks.evicted(cached.model_spec)

    @contextmanager
    def _noted(self, what: str, cached: CachedBackend) -> Iterator[None]:
        """Report an error in the summary, since an error in a hook must not fail a request."""
        try:
            yield
        except Exception as error:
            if ends_run(error):
                raise
            text = f"{what}, {cached.model_spec}: {type(error).__name__}: {redacted(str(error))}"
            self.stats.hook_errors.append(text)

    def _base_loaded(self, name: str, seconds: float) -> None:
        self.stats.base_loaded(short_name(name), seconds)

    def _recalled(self, name: str, answers: int, seconds: float) -> None:
        self.stats.base_recalled(short_name(name), answers, seconds)

    def _fetched(self, name: str, nbytes: int, seconds: float) -> None:
        """Count the seconds apart from the test, and what was fetched for the summary."""
        self._unreported.append(seconds)
        if nbytes:
            self.stats.fetched.append(f"{name}, {format_bytes(nbytes)}, {seconds:.1f} s")

    def take_load_seconds(self) -> tuple[float, float]:
        """Return the seconds spent in loads since the last call, and those spent importing libraries for them."""
        imported, self._seconds_before = import_seconds() - self._seconds_before, import_seconds()
        self.stats.import_seconds += imported
        loaded = 0.0
        while self._unreported:  # threads may append meanwhile
            loaded += self._unreported.popleft()
        return loaded, imported

    def close(self) -> None:
        """Close everything for good; a thread that still loads closes its backend itself."""
        self.cache.shutdown(timeout=_PATIENCE_AT_END)
        self.take_load_seconds()
        keep_modules()
        if self._recorded:
            self._note_circumstances()

    def _note_circumstances(self) -> None:
        stats, names = self.stats, self.requests.names
        stats.versions = imported_versions()
        stats.devices = device_names({spec.device for spec in self._loaded} - {"auto"})
        unnamed = [spec for spec in self._loaded if spec not in names.values()]
        for name, spec in (*names.items(), *((str(spec), spec) for spec in unnamed)):
            stats.note_spec(name, {"fields": spec.as_dict(), "digest": self._loaded.get(spec)})


def open_session(
    config: pytest.Config, settings: SwaySettings, owner: Callable[[], Owner], terminal: int | None
) -> SwaySession:
    """Return the session of a run; from now on, its reports hide secrets.

    Args:
        config: The run's configuration.
        settings: The settings of the run.
        owner: Returns the test or fixture that runs now.
        terminal: A descriptor of standard error that pytest's capture does not replace.
    """
    registered(config, "pytest_sway_secrets", partial(SecretsHidden, config))
    return SwaySession(
        settings,
        _Hooks(config),
        named_specs(config),
        load_progress(config, _opened(terminal)),
        owner=owner,
        share_weights=weights_folder(config),
        recorded=asks_for_reports(config),
    )


class _Hooks:
    """The hooks ``pytest_sway_*``, as the session calls them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def build(self, spec: ModelSpec) -> Any | None:
        return self._config.hook.pytest_sway_build_backend(spec=spec, config=self._config)

    def builds(self) -> bool:
        return bool(self._config.hook.pytest_sway_build_backend.get_hookimpls())

    def loaded(self, cached: CachedBackend) -> None:
        self._config.hook.pytest_sway_backend_loaded(cached=cached, config=self._config)

    def evicted(self, spec: ModelSpec) -> None:
        self._config.hook.pytest_sway_backend_evicted(spec=spec, config=self._config)


def _opened(descriptor: int | None) -> TextIO | None:
    """Open a terminal; return ``None`` for what is none."""
    if descriptor is None or not os.isatty(descriptor):
        return None
    return open(descriptor, "w", encoding="utf-8", closefd=False)
