"""The cache equals its reference model for any order of requests, releases, faults and sizes (hypothesis)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.entries import Lease, SizeByPart
from pytest_sway.errors import BackendLoadError, CacheFullError, SpecError
from tests.unit.fakes import Call, InformedFakeBuild, SharingBackend, names, spec
from tests.unit.fire.profiles import PROFILE, machine_settings
from tests.unit.fire.reference import Failed, Interrupted, Item, Reference, Refused, Size

NAMES = ("a", "a+x", "a+y", "b", "b+x", "c")
SAME: dict[type[Exception], tuple[type[BaseException], ...]] = {
    Refused: (CacheFullError,),
    Failed: (BackendLoadError, SpecError),
    Interrupted: (KeyboardInterrupt, SystemExit),
}

a_name = st.sampled_from(NAMES)
an_interrupt = st.sampled_from([KeyboardInterrupt, SystemExit])
some_bytes = st.none() | st.sampled_from([1, 60, 100, 150, 260])


def size_of(name: str, base_bytes: int | None) -> Size:
    base, _, adapter = name.partition("+")
    return None if base_bytes is None else {base: base_bytes, name: 10} if adapter else {base: base_bytes}


def parts_of(name: str, base_bytes: int | None) -> SizeByPart | None:
    size = size_of(name, base_bytes)
    return None if size is None else dict[Hashable, int](size.items())


class CacheMachine(RuleBasedStateMachine):
    """One thread, with leases that it or ended threads have taken."""

    @initialize(max_size=st.integers(1, 4), max_bytes=st.none() | st.sampled_from([150, 250, 400]))
    def start(self, max_size: int, max_bytes: int | None) -> None:
        logging.disable(logging.WARNING)
        self.build = InformedFakeBuild()
        self.cache = BackendCache(max_size, max_bytes=max_bytes, build=self.build, lease_timeout=0.0)
        self.reference = Reference(max_size, max_bytes)
        self.leases: list[tuple[Lease, Item]] = []
        self.released: list[Lease] = []
        for name in NAMES:
            self.set_size(name, 100, 100)

    @rule(name=a_name, estimate=some_bytes, size=some_bytes)
    def set_size(self, name: str, estimate: int | None, size: int | None) -> None:
        self.reference.estimates[name], self.reference.sizes[name] = size_of(name, estimate), size_of(name, size)
        self.build.estimates[name], self.build.sizes[name] = parts_of(name, estimate), parts_of(name, size)

    @rule(name=a_name, where=st.sampled_from(["check", "load", "close"]))
    def set_error(self, name: str, where: str) -> None:
        errors: Any = getattr(self.build, f"{where}_errors")
        errors[name] = [SpecError("a fault") if where == "check" else RuntimeError("a fault")]
        self.reference.faults[where, name] = "error"

    @rule(
        name=a_name,
        where=st.sampled_from(["load", "close"]),
        interrupt=st.sampled_from([KeyboardInterrupt, SystemExit]),
    )
    def set_interrupt(self, name: str, where: str, interrupt: type[BaseException]) -> None:
        errors: Any = getattr(self.build, f"{where}_errors")
        errors[name] = [interrupt()]
        self.reference.faults[where, name] = "interrupt"

    @rule(name=a_name, elsewhere=st.booleans())
    def acquire(self, name: str, elsewhere: bool) -> None:
        request: Callable[[], Lease] = partial(self.cache.acquire, spec(name))
        both = self.both(Call(request).result if elsewhere else request, partial(self.reference.acquire, name))
        if both is not None:
            lease, item = both
            assert lease.backend.use() == name
            assert lease.backend is self.build.built[self.reference.built.index(item)]
            self.leases.append((lease, item))

    @rule(name=a_name)
    def get_or_load(self, name: str) -> None:
        def as_told() -> Item:
            item = self.reference.acquire(name)
            self.reference.release(item)
            return item

        both = self.both(partial(self.cache.get_or_load, spec(name)), as_told)
        if both is not None:
            cached, item = both
            assert cached.backend is self.build.built[self.reference.built.index(item)]

    @rule(data=st.data(), elsewhere=st.booleans())
    def release(self, data: st.DataObject, elsewhere: bool) -> None:
        if self.leases:
            lease, item = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
            self.released.append(lease)
            self.both(Call(lease.release).result if elsewhere else lease.release, partial(self.reference.release, item))

    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        if self.released:
            self.both(data.draw(st.sampled_from(self.released)).release, partial(self.reference.release, None))

    @rule(data=st.data())
    def drop_a_lease(self, data: st.DataObject) -> None:
        if self.leases:
            _, item = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
            item.leases -= 1

    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        if self.reference.built:
            number = data.draw(st.integers(0, len(self.reference.built) - 1))
            backend, item = self.build.built[number], self.reference.built[number]
            for cached in [*self.cache.ready(), *(lease.cached for lease, _ in self.leases)]:
                if cached.backend is backend:
                    self.both(partial(self.cache.retire, cached), partial(self.reference.retire, [item]))
                    break

    @rule()
    def evict_all(self) -> None:
        self.both(self.cache.evict_all, lambda: self.reference.retire(self.reference.residents()))

    def both(self, real: Callable[[], Any], told: Callable[[], Any]) -> tuple[Any, Any] | None:
        """Return the common result, or ``None`` if both raise the same error."""
        try:
            expected = told()
        except tuple(SAME) as refusal:
            try:
                real()
            except SAME[type(refusal)]:
                return None
            raise AssertionError(f"expected {refusal!r}") from refusal
        return real(), expected

    @invariant()
    def they_agree(self) -> None:
        reference, build = self.reference, self.build
        assert names(self.cache) == [item.name for item in reference.ready]
        assert sorted(cached.backend.name for cached in self.cache.leased()) == sorted(
            item.name for item in reference.ready if item.leases
        )
        assert [backend.closes for backend in build.built] == [item.closes for item in reference.built]
        assert build.oracle.live == len(reference.residents())
        assert build.oracle.peak <= reference.max_size
        assert {key.removeprefix("org/"): count for key, count in build.base_loads.items()} == reference.base_loads
        loaded_bases = build.pool.keys()
        assert {key.removeprefix("org/") for key in loaded_bases} == reference.bases
        total = self.cache.stats.total()
        counts = reference.counts
        assert (total.loads, total.hits, total.failures, total.evictions, len(self.cache.stats.close_errors)) == (
            counts["loads"],
            counts["hits"],
            counts["failures"],
            counts["evictions"],
            counts["close errors"],
        )

    def teardown(self) -> None:
        try:
            for _ in NAMES:
                with suppress(KeyboardInterrupt, SystemExit):
                    self.cache.shutdown()
            assert all(backend.closes == 1 for backend in self.build.built)
            assert self.build.oracle.live == 0
            assert self.build.base_loads == self.build.base_closes
            assert all(isinstance(backend, SharingBackend) for backend in self.build.built)
        finally:
            logging.disable(logging.NOTSET)


TestModel = CacheMachine.TestCase
TestModel.settings = machine_settings(PROFILE.model)
