"""`SwaySession`: one run's cache and all that happens around it, without pytest's hooks.

It parses and remembers, names the holders of leases, compares what a test leaves behind with what it was given, and
looks for what outlives its backend.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sway.backends import Builder, require_differential
from pytest_sway.building import Listener
from pytest_sway.cache import BackendCache, CachedBackend, Lease
from pytest_sway.errors import CacheFullError, MutationError, SpecError, SwayError, SwayWarning
from pytest_sway.hygiene import changes, leak, leak_message, mutation_message
from pytest_sway.spec import Key, ModelSpec, SpecLike, short_name, with_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.report.terminal import LoadProgress
    from pytest_sway.scoring import DifferentialBackend
    from pytest_sway.settings import SwaySettings
    from pytest_sway.stats import SwayStats

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class SwayBackend(Protocol):
    """The type of the fixture ``sway_backend``."""

    def __call__(self, spec: SpecLike | None = None, *, adapter_path: Path | None = None) -> DifferentialBackend:
        """Return the live backend of ``spec``, which stays loaded until the test's teardown.

        Args:
            spec: A `ModelSpec`, a mapping of its fields, a configured name, or any object with the same attributes.
                It can be left out under a marker ``sway_spec`` with exactly one spec.
            adapter_path: An adapter that takes the place of the spec's own.

        Raises:
            SwayError: The spec is wrong, or cannot be loaded; the message says why and what to do.
        """
        ...


class BuildHooks(Protocol):
    """The user's part in building and watching backends."""

    def build(self, spec: ModelSpec) -> Any | None:
        """Return a backend, or ``None`` to leave it to pytest-sway."""
        ...

    def builds(self) -> bool:
        """Whether anybody implements `build`."""
        ...

    def loaded(self, cached: CachedBackend) -> None:
        """Tell the user of a load."""
        ...

    def evicted(self, spec: ModelSpec) -> None:
        """Tell the user of a close."""
        ...


class HookedBuilder(Builder):
    """A builder that asks the user's hook first."""

    def __init__(self, hooks: BuildHooks, **options: Any) -> None:
        super().__init__(**options)
        self._hooks = hooks

    def __call__(self, spec: ModelSpec, *, adapter_path: Path | None = None) -> DifferentialBackend:
        """Build the backend of ``spec``, by the hook if it takes it."""
        spec = self.resolve(with_adapter(spec, adapter_path))
        built = self._hooks.build(spec)
        if built is not None:
            return require_differential(built, "the hook pytest_sway_build_backend")
        super().check(spec)
        return super().__call__(spec)

    def check(self, spec: ModelSpec) -> None:
        """Check what can be checked before the load; where a hook may take the spec, that is nothing."""
        if not self._hooks.builds():
            super().check(spec)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A load that failed for good."""

    error_type: type[SwayError]
    text: str
    holder: str

    def again(self) -> SwayError:
        return self.error_type(f"{self.text}\n(First met by {self.holder}; the load is not tried again.)")


class SwaySession(Listener):
    """What one run holds, and what it has found out.

    Args:
        settings: What is in force.
        hooks: The user's hooks.
        named: Specs by name.
        progress: Shows loads that take long.
        who: Names whoever runs now, for leases that no fixture ``sway_backend`` took.
    """

    def __init__(
        self,
        settings: SwaySettings,
        hooks: BuildHooks,
        named: Mapping[str, Any],
        progress: LoadProgress,
        who: Callable[[], str],
    ) -> None:
        self._settings = settings
        self._hooks = hooks
        self._progress = progress
        self._failures: dict[Key, _Failure] = {}
        self._users: dict[Key, deque[str]] = {}
        self._pins: list[dict[Key, Lease]] = []
        self._unreported_seconds = 0.0
        builder = HookedBuilder(
            hooks,
            device=settings.device,
            dtype=settings.dtype,
            on_base_load=self._base_loaded,
        )
        self.cache = BackendCache(
            settings.cache_size,
            max_bytes=settings.cache_memory,
            build=builder,
            named=named,
            listener=self,
            who=who,
        )

    @property
    def stats(self) -> SwayStats:
        """What happened so far."""
        return self.cache.stats

    # --- requests -----------------------------------------------------------------------------------------------------

    @contextmanager
    def backends_for(self, test: str, marked: Sequence[SpecLike]) -> Iterator[SwayBackend]:
        """Give what hands a test its backends and pins them; the block's end compares and releases them.

        Args:
            test: The test's node id.
            marked: The specs of its marker.

        Raises:
            MutationError: The test left one of them changed.
        """
        pins: dict[Key, Lease] = {}
        self._pins.append(pins)

        def sway_backend(spec: SpecLike | None = None, *, adapter_path: Path | None = None) -> DifferentialBackend:
            asked = _marked_spec(marked) if spec is None else spec
            key = self._key(asked, adapter_path, test)
            lease = pins.get(key)
            if lease is None:
                lease = pins[key] = self._acquire(key, asked, adapter_path, test)
            backend: DifferentialBackend = lease.backend
            return backend

        try:
            yield sway_backend
        finally:
            self._pins.remove(pins)
            try:
                changed = self.inspect(test, [lease.cached for lease in pins.values()])
            finally:
                while pins:
                    pins.popitem()[1].release()
            if changed is not None:
                raise changed

    def _key(self, spec: SpecLike, adapter_path: Path | None, test: str) -> Key:
        try:
            return self.cache.key(spec, adapter_path=adapter_path)
        except SpecError as error:
            unparsed = ("unparsed", repr(spec))
            self._raise_if_failed(unparsed)
            self._remember(unparsed, error, test)
            raise

    def _acquire(self, key: Key, spec: SpecLike, adapter_path: Path | None, test: str) -> Lease:
        self._raise_if_failed(key)
        try:
            lease = self.cache.acquire(spec, adapter_path=adapter_path, holder=test)
        except CacheFullError as error:
            size = self._settings.cache_size
            raise CacheFullError(
                f"{error} The options are --sway-cache-size={size + 1} and --sway-cache-memory."
            ) from None
        except SwayError as error:
            self._remember(key, error, test)
            raise
        self._users.setdefault(key, deque(maxlen=3)).append(test)
        return lease

    def _raise_if_failed(self, key: Key) -> None:
        failure = self._failures.get(key)
        if failure is not None:
            raise failure.again()

    def _remember(self, key: Key, error: SwayError, test: str) -> None:
        if error.permanent:
            self._failures[key] = _Failure(type(error), str(error), test)

    # --- hygiene ------------------------------------------------------------------------------------------------------

    def inspect(self, test: str, used: Sequence[CachedBackend]) -> MutationError | None:
        """Compare what a test has used with what it was given, and retire what is changed.

        Returns:
            The error for the test, where changes are errors.
        """
        if self._settings.on_mutation == "ignore":
            return None
        ready = self.cache.ready()  # what is retired was reported when that was done
        changed = [
            (cached, lines)
            for cached in used
            if any(cached is other for other in ready) and (lines := changes(cached.backend))
        ]
        if not changed:
            return None
        for other in ready:  # what shares a changed base is changed too, and nobody else is to blame
            if changes(other.backend):
                self.cache.retire(other)
        message = mutation_message(test, [(cached.model_spec, lines) for cached, lines in changed])
        self.stats.mutations.append(message)
        if self._settings.on_mutation == "warn":
            warnings.warn(message, SwayWarning, stacklevel=2)
            return None
        return MutationError(message)

    def inspect_leased(self, test: str) -> MutationError | None:
        """Compare what wider fixtures hold, after the body of ``test``; what tests hold is compared at its release."""
        pinned = {id(lease.cached) for pins in self._pins for lease in pins.values()}
        return self.inspect(test, [cached for cached in self.cache.leased() if id(cached) not in pinned])

    def failed(self) -> bool:
        """Whether something was found that fails the run although every test passed."""
        return bool(self.stats.leaks) and self._settings.on_leak == "error"

    # --- loads and closes ---------------------------------------------------------------------------------------------

    @contextmanager
    def loading(self, spec: ModelSpec) -> Iterator[None]:
        """Show a load that takes long."""
        with self._progress.loading(str(spec)):
            yield

    def loaded(self, cached: CachedBackend) -> None:
        """Count the seconds of a load apart from the test, and tell the user's hook."""
        self._unreported_seconds += cached.load_seconds
        self._hooks.loaded(cached)

    def evicted(self, cached: CachedBackend) -> None:
        """Look for what outlived its close, and tell the user's hook."""
        users = tuple(self._users.pop(cached.key, ()))
        if self._settings.on_leak != "ignore":
            found = leak(cached.backend)
            if found is not None:
                self.stats.leaks.append(leak_message(cached.model_spec, found, users))
        try:
            self._hooks.evicted(cached.model_spec)
        except Exception as error:  # it must not fail the request that the eviction was for
            self.stats.close_errors.append(f"hook pytest_sway_backend_evicted: {type(error).__name__}: {error}")

    def _base_loaded(self, name: str, seconds: float) -> None:
        self.stats.base_loaded(short_name(name), seconds)

    def take_load_seconds(self) -> float:
        """The seconds spent in loads since this was last asked."""
        seconds, self._unreported_seconds = self._unreported_seconds, 0.0
        return seconds

    def close(self) -> None:
        """Close everything for good."""
        self.stats.unreleased += self.cache.shutdown()


def _marked_spec(marked: Sequence[SpecLike]) -> SpecLike:
    if len(marked) != 1:
        found = "it has no such marker" if not marked else f"its marker has {len(marked)}"
        raise SpecError(
            f"sway_backend() without a spec needs a marker sway_spec with exactly one on the test; {found}."
            " Pass the spec: sway_backend(spec)."
        )
    return marked[0]
