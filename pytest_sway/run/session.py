"""`SwaySession`: one run's cache, without pytest's hooks.

It serves the fixture `sway_backend` and remembers failed loads. It tells the user's hooks, the summary and the run's
`Hygiene` of loads and closes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from pytest_sway.backends.registry import Builder, BuildHooks
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.builds import Listener
from pytest_sway.cache.entries import CachedBackend, Lease
from pytest_sway.cache.owners import Owner
from pytest_sway.errors import SpecError, SwayError
from pytest_sway.run.hygiene import Hygiene
from pytest_sway.spec.identity import Key, adapter_digest_in, look_again, resolved_key
from pytest_sway.spec.model_kwargs import in_short
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.parsing import SpecLike
from pytest_sway.spec.paths import short_name
from pytest_sway.system.imports import import_seconds, keep_modules
from pytest_sway.system.redaction import redacted
from pytest_sway.system.versions import device_names, imported_versions
from pytest_sway.system.wording import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.cache.stats import SwayStats
    from pytest_sway.errors import MutationError
    from pytest_sway.protocols import DifferentialBackend
    from pytest_sway.report.progress import LoadProgress
    from pytest_sway.run.settings import SwaySettings

__tracebackhide__ = True


_PATIENCE_AT_END: Final = 3.0
"""Seconds that the end of a session waits for loads in progress. pytest-xdist kills a worker after ten seconds, and
five of them may pass before the worker hears of an interrupt."""


class SwayBackend(Protocol):
    """The type of the fixture ``sway_backend``."""

    def __call__(
        self, spec: SpecLike | None = None, *, adapter_path: Path | None = None, **fields: Any
    ) -> DifferentialBackend:
        """Return the backend of ``spec``, which stays loaded until the test's teardown.

        Args:
            spec: A `ModelSpec`, a mapping of its fields, a configured name, or any object with the same attributes.
                You can omit it if the marker ``sway_spec`` has exactly one spec.
            adapter_path: Replaces the spec's adapter.
            fields: The fields of a spec, instead of ``spec``: ``sway_backend(base=..., adapter=...)``.

        Raises:
            SwayError: The spec is wrong or cannot be loaded; the message says why and what to do.
        """
        ...


class Hooks(BuildHooks, Protocol):
    """The hooks ``pytest_sway_*``, without pytest."""

    def loaded(self, cached: CachedBackend) -> None:
        """Call ``pytest_sway_backend_loaded``."""
        ...

    def evicted(self, spec: ModelSpec) -> None:
        """Call ``pytest_sway_backend_evicted``."""
        ...


@dataclass(frozen=True, slots=True)
class _Failure:
    """A permanent failure of a load."""

    error_type: type[SwayError]
    text: str
    holder: str

    def again(self) -> SwayError:
        return self.error_type(f"{self.text}\n(First raised for {self.holder}; the load is not repeated.)")


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
        hygiene: The checks of its backends.
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
        self._failures: dict[Hashable, _Failure] = {}
        self._names: dict[str, ModelSpec] = {}
        self._loaded: dict[ModelSpec, str | None] = {}
        self._unreported_seconds = 0.0
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
        self.hygiene = Hygiene(self.cache, settings)

    @property
    def stats(self) -> SwayStats:
        """The counts so far."""
        return self.cache.stats

    # --- requests -----------------------------------------------------------------------------------------------------

    @contextmanager
    def backends_for(self, test: str, marked: Sequence[SpecLike]) -> Iterator[SwayBackend]:
        """Give the value of the fixture ``sway_backend``; the backends that it returns are pinned until the block ends.

        Args:
            test: The test's node id.
            marked: The specs of its ``sway_spec`` marker.
        """
        owner = Owner(test, keeps=True)
        leases: dict[Key, Lease] = {}

        def sway_backend(
            spec: SpecLike | None = None, *more: object, adapter_path: Path | None = None, **fields: Any
        ) -> DifferentialBackend:
            if more or fields:
                spec = _of_fields(spec, more, fields)
            resolved = self._resolve(_marked_spec(marked) if spec is None else spec, adapter_path, test)
            key = resolved_key(resolved)
            lease = None if owner.over else leases.get(key)
            if lease is None:  # another thread of the test may add one at the same time
                lease = leases.setdefault(key, self._acquire((key, resolved.trust_remote_code), resolved, owner))
            backend: DifferentialBackend = lease.backend
            return backend

        try:
            yield sway_backend
        finally:
            self.cache.end(owner)

    def resolve(self, spec: SpecLike, adapter_path: Path | None = None) -> ModelSpec:
        """Return ``spec`` parsed, as the cache does; a name is remembered.

        Raises:
            SpecError: It is malformed.
        """
        resolved = self.cache.resolve(spec, adapter_path=adapter_path)
        if isinstance(spec, str) and adapter_path is None:
            self._names[spec] = resolved
        return resolved

    def _resolve(self, spec: SpecLike, adapter_path: Path | None, test: str) -> ModelSpec:
        try:
            return self.resolve(spec, adapter_path)
        except SwayError as error:
            if isinstance(spec, Mapping | str):  # other objects can differ and have the same repr
                self._fail_once(("malformed", repr(spec), repr(adapter_path)), error, test)
            raise

    def _acquire(self, request: Hashable, spec: ModelSpec, owner: Owner) -> Lease:
        failure = self._failures.get(request)
        if failure is not None:
            raise failure.again()
        try:
            return self.cache.acquire(spec, owner=owner)
        except SwayError as error:
            self._fail_once(request, error, owner.name)
            raise

    def _fail_once(self, request: Hashable, error: SwayError, test: str) -> None:
        """Remember a permanent failure, or raise the remembered one."""
        if request in self._failures:
            raise self._failures[request].again()
        if error.permanent:
            self._failures[request] = _Failure(type(error), str(error), test)

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
        self._unreported_seconds += cached.load_seconds
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
            text = f"{what}, {cached.model_spec}: {type(error).__name__}: {redacted(str(error))}"
            self.stats.hook_errors.append(text)

    def _base_loaded(self, name: str, seconds: float) -> None:
        self.stats.base_loaded(short_name(name), seconds)

    def _recalled(self, name: str, answers: int, seconds: float) -> None:
        self.stats.base_recalled(short_name(name), answers, seconds)

    def _fetched(self, name: str, nbytes: int, seconds: float) -> None:
        """Count the seconds apart from the test, and what was fetched for the summary."""
        self._unreported_seconds += seconds
        if nbytes:
            self.stats.fetched.append(f"{name}, {format_bytes(nbytes)}, {seconds:.1f} s")

    def take_load_seconds(self) -> tuple[float, float]:
        """Return the seconds spent in loads since the last call, and those spent importing libraries for them."""
        imported, self._seconds_before = import_seconds() - self._seconds_before, import_seconds()
        self.stats.import_seconds += imported
        loaded, self._unreported_seconds = self._unreported_seconds, 0.0
        return loaded, imported

    def close(self) -> None:
        """Close everything for good; a thread that still loads closes its backend itself."""
        self.cache.shutdown(timeout=_PATIENCE_AT_END)
        self.take_load_seconds()
        keep_modules()
        if self._recorded:
            self._note_circumstances()

    def _note_circumstances(self) -> None:
        stats, names = self.stats, self._names
        stats.versions = imported_versions()
        stats.devices = device_names({spec.device for spec in self._loaded} - {"auto"})
        unnamed = [spec for spec in self._loaded if spec not in names.values()]
        for name, spec in (*names.items(), *((str(spec), spec) for spec in unnamed)):
            stats.specs[name] = {"fields": spec.as_dict(), "digest": self._loaded.get(spec)}


def _of_fields(spec: SpecLike | None, more: tuple[object, ...], fields: dict[str, Any]) -> SpecLike:
    """The spec that fields are, as in ``sway_backend(base=..., adapter=...)``."""
    if more:
        raise SpecError(
            f"sway_backend takes one spec; found {1 + len(more)} arguments. For a base and an adapter, write"
            " sway_backend(base=..., adapter=...)."
        )
    if spec is not None:
        raise SpecError(
            f"sway_backend takes a spec or its fields; found {spec!r} beside {', '.join(fields)}. For another adapter"
            " on that spec, write sway_backend(spec, adapter_path=...)."
        )
    return fields


def _marked_spec(marked: Sequence[SpecLike]) -> SpecLike:
    if len(marked) != 1:
        found = "the test has no such marker" if not marked else f"the test's marker has {len(marked)}"
        raise SpecError(
            f"sway_backend() without a spec needs a sway_spec marker with exactly one spec; {found}."
            " Pass the spec: sway_backend(spec)."
        )
    return marked[0]
