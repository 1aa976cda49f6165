"""`Requests`: what the fixture ``sway_backend`` does: it reads specs, keeps leases, and repeats no failed load."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sway.cache.owners import Owner
from pytest_sway.errors import SpecError, SwayError
from pytest_sway.spec.identity import resolved_key
from pytest_sway.spec.kinds import KINDS
from pytest_sway.spec.parsing import SpecLike

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.cache.backend_cache import BackendCache
    from pytest_sway.cache.entries import Lease
    from pytest_sway.protocols import DifferentialBackend
    from pytest_sway.spec.identity import Key
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


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


@dataclass(frozen=True, slots=True)
class _Failure:
    """A permanent failure of a load."""

    error_type: type[SwayError]
    text: str
    holder: str

    def again(self) -> SwayError:
        return self.error_type(f"{self.text}\n(First raised for {self.holder}; the load is not repeated.)")


class Requests:
    """The requests of one run.

    Args:
        cache: Loads what is asked for.

    Attributes:
        names: The specs of the names that were asked for.
    """

    def __init__(self, cache: BackendCache) -> None:
        self._cache = cache
        self._failures: dict[Hashable, _Failure] = {}
        self.names: dict[str, ModelSpec] = {}

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
            self._cache.end(owner)

    def resolve(self, spec: SpecLike, adapter_path: Path | None = None) -> ModelSpec:
        """Return ``spec`` parsed, as the cache does; a name is remembered.

        Raises:
            SpecError: It is malformed.
        """
        resolved = self._cache.resolve(spec, adapter_path=adapter_path)
        if isinstance(spec, str) and adapter_path is None:
            self.names[spec] = resolved
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
            return self._cache.acquire(spec, owner=owner)
        except SwayError as error:
            if KINDS[spec.kind].of_files:  # a server, or what a class depends on, may change in the run
                self._fail_once(request, error, owner.name)
            raise

    def _fail_once(self, request: Hashable, error: SwayError, test: str) -> None:
        """Remember a permanent failure, or raise the remembered one if it is the same."""
        before = self._failures.get(request)
        if before is not None and before.text == str(error):
            raise before.again()
        if error.permanent:
            self._failures[request] = _Failure(type(error), str(error), test)


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
