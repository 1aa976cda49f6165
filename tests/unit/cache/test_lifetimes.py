"""Generations, leases and processes: late events do not affect newer entries, and ended ones leave nothing behind."""

from __future__ import annotations

import gc
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.builds import Listener
from pytest_sway.cache.entries import CachedBackend
from pytest_sway.cache.owners import Owner
from pytest_sway.errors import BackendClosedError, BackendLoadError, BackendUseError, CacheDeadlockError, CacheFullError
from tests.unit.fakes import DEADLINE, Call, FakeBackend, FakeBuild, InformedFakeBuild, Watched, names, spec


def test_inv08_a_late_release_does_not_touch_the_next_generation(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    old = cache.acquire(spec("a"))
    cache.retire(old.cached)
    new = cache.acquire(spec("a"))
    old.release()
    old.release()
    assert build.closes == {"a": [1, 0]}
    assert new.backend.use() == "a"
    assert [cached.backend for cached in cache.leased()] == [new.backend]
    new.release()
    assert names(cache) == ["a"]


def test_inv08_a_late_retirement_does_not_touch_the_next_generation(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    old = cache.get_or_load(spec("a"))
    cache.retire(old)
    new = cache.get_or_load(spec("a"))
    cache.retire(old)
    assert build.closes == {"a": [1, 0]}
    assert cache.get_or_load(spec("a")) is new


def test_inv08_a_close_that_ends_late_does_not_touch_the_next_generation(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    held = cache.acquire(spec("a"))
    cache.retire(held.cached)
    gate = build.close_gate("a")
    releaser = Call(held.release)
    gate.wait()
    new = cache.acquire(spec("a"))
    gate.open()
    releaser.result()
    assert build.closes == {"a": [1, 0]}
    assert new.backend.use() == "a"
    assert names(cache) == ["a"]


def test_inv08_a_load_that_is_interrupted_late_does_not_touch_the_next_generation(build: FakeBuild) -> None:
    """The first load fails while it closes its backend; the next generation starts only afterwards."""

    class InterruptFirst(Listener):
        interrupts = 1

        def loaded(self, cached: CachedBackend) -> None:
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt

    cache = BackendCache(max_size=1, build=build, listener=InterruptFirst())
    gate, (leader, waiter) = Watched(cache).crowd(build, 1)
    gate.open()
    assert isinstance(leader.error(), KeyboardInterrupt)
    lease = waiter.result()
    assert lease.backend.use() == "a"
    assert [cached.backend for cached in cache.leased()] == [lease.backend]
    assert build.closes == {"a": [0]}


@pytest.fixture
def weak() -> list[weakref.ref[object]]:
    return []


def _is_gone(weak: list[weakref.ref[object]]) -> bool:
    gc.collect()
    return bool(weak) and all(ref() is None for ref in weak)


def _nothing_is_left(cache: BackendCache) -> bool:
    return not (
        cache._ledger.dropped or cache._ledger._retired or cache._ledger._entries or cache._ledger._lock.locked()
    )


def _watch_built(build: FakeBuild, weak: list[weakref.ref[object]]) -> None:
    """Keep only weak references to built backends."""
    usual: Callable[..., FakeBackend] = build.make

    def make(asked: object) -> FakeBackend:
        backend = usual(asked)
        weak.append(weakref.ref(backend))
        return backend

    build.make = make  # type: ignore[method-assign]
    build.built = _Forgetful()


class _Forgetful(list[FakeBackend]):
    def append(self, backend: FakeBackend) -> None:
        pass


def test_inv13_what_was_closed_is_kept_by_nothing(build: FakeBuild, weak: list[weakref.ref[object]]) -> None:
    _watch_built(build, weak)
    cache = BackendCache(max_size=1, build=build)
    for name in "aab":
        cache.get_or_load(spec(name))
    cache.evict_all()
    assert _is_gone(weak)
    assert _nothing_is_left(cache)


def test_inv13_a_released_lease_keeps_the_backend_only_as_long_as_it_lives(
    build: FakeBuild, weak: list[weakref.ref[object]]
) -> None:
    _watch_built(build, weak)
    cache = BackendCache(build=build)
    lease = cache.acquire(spec("a"))
    lease.release()
    cache.evict_all()
    assert not _is_gone(weak)
    del lease
    assert _is_gone(weak)


def test_inv13_errors_of_others_keep_nothing(build: FakeBuild, weak: list[weakref.ref[object]]) -> None:
    """The errors of a failed load, a full cache and a deadlock are still held, with their tracebacks."""
    _watch_built(build, weak)
    cache = BackendCache(max_size=1, build=build)
    build.load_errors["b"] = [RuntimeError("broken")]
    build.inside["c"] = lambda: cache.acquire(spec("c"))
    errors: list[BaseException] = []
    for name, expected in (("b", BackendLoadError), ("c", CacheDeadlockError)):
        with pytest.raises(expected) as raised:
            cache.acquire(spec(name))
        errors.append(raised.value)
    with cache.lease(spec("a")), pytest.raises(CacheFullError) as full:
        cache.acquire(spec("b"))
    errors.append(full.value)
    cache.evict_all()
    assert _is_gone(weak)
    assert _nothing_is_left(cache)
    assert len(errors) == 3


def test_inv13_a_half_built_backend_is_not_kept_by_the_error_that_stopped_it(
    build: FakeBuild, weak: list[weakref.ref[object]]
) -> None:
    _watch_built(build, weak)
    cache = BackendCache(build=build)
    usual = build.make

    def make(asked: object) -> FakeBackend:
        half_built = usual(asked)  # type: ignore[arg-type]
        raise RuntimeError(f"no adapter for {half_built.name}")

    build.make = make  # type: ignore[method-assign]
    with pytest.raises(BackendLoadError, match="no adapter for a") as raised:
        cache.acquire(spec("a"))
    assert _is_gone(weak)
    assert traceback.format_exception(raised.value)


def test_inv13_nothing_is_left_after_a_crowd(build: FakeBuild, weak: list[weakref.ref[object]]) -> None:
    _watch_built(build, weak)
    cache = BackendCache(max_size=1, build=build)
    build.load_errors["a"] = [KeyboardInterrupt(), RuntimeError("broken")]
    gate, calls = Watched(cache).crowd(build, 3)
    gate.open()
    errors = [type(call.error()) for call in calls]
    assert errors[0] is KeyboardInterrupt
    assert BackendLoadError in errors
    del calls
    gc.collect()  # releases dropped leases
    cache.leased()
    cache.evict_all()
    assert _nothing_is_left(cache)
    assert all(ref() is None for ref in weak)


def test_inv13_the_request_that_loaded_keeps_no_lease(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    lease = weakref.ref(cache.acquire(spec("a")))
    gc.collect()
    assert lease() is None
    assert names(cache) == ["a"]
    assert not cache.leased()


def test_inv15_releasing_twice_is_harmless(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    first, second = cache.acquire(spec("a")), cache.acquire(spec("a"))
    for _ in range(3):
        first.release()
    with pytest.raises(CacheFullError):
        cache.acquire(spec("b"))
    assert second.backend.use() == "a"


def test_inv15_releasing_from_any_thread_and_at_once_is_harmless(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    first, second = cache.acquire(spec("a")), cache.acquire(spec("a"))
    start = threading.Barrier(8)

    def release() -> None:
        start.wait(DEADLINE)
        first.release()

    for call in [Call(release) for _ in range(8)]:
        call.result()
    assert second.backend.use() == "a"
    assert len(cache.leased()) == 1
    Call(second.release).result()
    assert not cache.leased()


def test_inv15_a_lease_is_released_when_its_block_raises(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    with pytest.raises(ZeroDivisionError), cache.lease(spec("a")):
        raise ZeroDivisionError
    assert not cache.leased()


def _in_child(work: Callable[[], bool]) -> int:
    """Return the exit status of a forked child that runs ``work``: 0 if it is True. A watchdog ends a hanging child."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            done = Call(work)
            done.thread.join(DEADLINE)
            status = 3 if done.thread.is_alive() else 0 if done.result() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")


def _in_a_stack(cache: BackendCache) -> Any:
    stack = ExitStack()
    stack.enter_context(cache.lease(spec("a")))
    return stack


def _in_a_generator(cache: BackendCache) -> Any:
    def block() -> Iterator[None]:
        with cache.lease(spec("a")):
            yield

    generator = block()
    next(generator)
    return generator


@pytest.mark.parametrize("opened", [_in_a_stack, _in_a_generator])
def test_inv15_a_block_that_nobody_leaves_is_collected_while_the_lock_is_held(
    build: FakeBuild, opened: Callable[[BackendCache], Any]
) -> None:
    cache = BackendCache(max_size=1, build=build)
    left_open = [opened(cache)]
    left_open.append(left_open)
    del left_open

    def collect() -> bool:
        with cache._ledger._lock:
            gc.collect()
        return True

    assert Call(collect).result()
    assert not cache.leased()


def test_a_block_in_a_generator_that_is_closed_ends_with_it(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    _in_a_generator(cache).close()
    cache.evict_all()
    assert build.built[0].closes == 1
    assert not cache.loaded_keys()


forks = [needs_fork, pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")]


class TestOwner:
    """An owner's leases end with it, and no others do."""

    def test_inv17_its_leases_end_with_it_however_they_are_kept(self, build: FakeBuild) -> None:
        cache = BackendCache(max_size=3, build=build)
        owner, other = Owner("a test"), Owner("another")
        kept = cache.acquire(spec("a"), owner=owner)
        Call(partial(cache.acquire, spec("b"), owner=owner)).result()
        cache.acquire(spec("c"), owner=other, holder="a test")
        lives_on = cache.acquire(spec("a"), owner=other)
        cache.end(owner)
        assert [cached.model_spec for cached in cache.leased()] == [spec("a")]
        lives_on.release()
        assert not cache.leased()
        kept.release()

    def test_inv17_a_block_is_left_without_harm_after_its_end(self, build: FakeBuild) -> None:
        owner = Owner("a test")
        cache = BackendCache(max_size=1, build=build, owner=lambda: owner)
        with cache.lease(spec("a")) as backend:
            cache.end(owner)
            with cache.acquire(spec("b"), owner=Owner("another")) as next_one:
                assert next_one.use() == "b"
            with pytest.raises(BackendClosedError):
                backend.use()
        assert build.closes == {"a": [1], "b": [0]}

    def test_inv17_what_was_retired_is_closed_with_it(self, build: FakeBuild) -> None:
        owner = Owner("a test")
        cache = BackendCache(build=build)
        lease = cache.acquire(spec("a"), owner=owner)
        cache.evict_all()
        assert build.closes == {"a": [0]}
        cache.end(owner)
        assert build.closes == {"a": [1]}
        lease.release()

    def test_inv17_it_gets_nothing_after_its_end(self, build: FakeBuild) -> None:
        owner = Owner("a test")
        cache = BackendCache(build=build)
        cache.end(owner)
        with pytest.raises(BackendUseError, match=r"^a test has ended, but one of its threads still asks for dummy"):
            cache.acquire(spec("a"), owner=owner)
        assert not build.loads
        assert not cache.stats.total().failures

    def test_inv17_a_load_under_way_at_its_end_is_pinned_by_nobody(self, build: FakeBuild) -> None:
        owner = Owner("a test")
        cache = BackendCache(max_size=1, build=build)
        watched = Watched(cache)
        gate = build.load_gate("a")
        leader = Call(partial(cache.acquire, spec("a"), owner=owner))
        gate.wait()
        follower = Call(partial(cache.acquire, spec("a"), owner=owner))
        stranger = Call(partial(cache.acquire, spec("a")))
        watched.until_waiting(2)
        cache.end(owner)
        assert isinstance(follower.error(), BackendUseError)
        gate.open()
        assert isinstance(leader.error(), BackendUseError)
        with stranger.result() as backend:
            assert backend.use() == "a"
        assert not cache.leased()
        assert build.closes == {"a": [0]}

    def test_inv17_a_request_stops_waiting_for_room_when_its_owner_ends(self, build: FakeBuild) -> None:
        owner = Owner("a test")
        cache = BackendCache(max_size=1, build=build)
        watched = Watched(cache)
        held = cache.acquire(spec("a"))
        asker = Call(partial(cache.acquire, spec("b"), owner=owner))
        watched.until_waiting()
        cache.end(owner)
        assert isinstance(asker.error(), BackendUseError)
        assert not cache.stats.total().failures
        held.release()
        assert names(cache) == ["a"]


class TestFork:
    pytestmark = forks

    def test_inv19_the_child_starts_empty_and_closes_nothing(self, sharing: InformedFakeBuild) -> None:
        cache = BackendCache(max_size=2, build=sharing)
        cache.get_or_load(spec("a"))
        leased = cache.acquire(spec("b"))

        def work() -> bool:
            empty = not cache.loaded_keys() and not cache.leased() and not cache.ready()
            leased.release()
            leased.backend.base.release()
            cache.evict_all()
            cache.shutdown()
            return empty and all(backend.closes == 0 for backend in sharing.built) and not sharing.base_closes

        assert _in_child(work) == 0
        assert names(cache) == ["a", "b"]
        assert leased.backend.use() == "b"

    def test_inv19_the_child_of_a_fork_during_a_load_can_load(self, sharing: InformedFakeBuild) -> None:
        cache = BackendCache(max_size=1, build=sharing)
        loading = sharing.load_gate("a")
        leader = Call(partial(cache.acquire, spec("a")))
        loading.wait()

        def work() -> bool:
            sharing.load_gates.clear()
            return [cache.get_or_load(spec(name)).backend.use() for name in "ba"] == ["b", "a"]

        assert _in_child(work) == 0
        loading.open()
        assert leader.result().backend.use() == "a"

    def test_inv19_a_lock_that_another_thread_holds_at_the_fork_does_not_hang_the_child(self, build: FakeBuild) -> None:
        cache = BackendCache(build=build)
        cache.get_or_load(spec("a"))
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with cache._ledger._lock:
                held.set()
                done.wait(DEADLINE)

        holder = Call(hold)
        held.wait(DEADLINE)
        assert _in_child(lambda: not cache.loaded_keys() and bool(cache.get_or_load(spec("a")))) == 0
        done.set()
        holder.result()

    def test_inv19_a_base_that_loads_at_the_fork_can_be_loaded_in_the_child(self, sharing: InformedFakeBuild) -> None:
        cache = BackendCache(max_size=2, build=sharing)
        cache.get_or_load(spec("b+x"))
        loading, done = threading.Event(), threading.Event()

        def load() -> str:
            loading.set()
            done.wait(DEADLINE)
            return "a"

        loader = Call(lambda: sharing.pool.acquire("org/a", load))
        loading.wait(DEADLINE)

        def work() -> bool:
            loaded = [cache.get_or_load(spec(name)).backend.use() for name in ("a+x", "b+y")] == ["a+x", "b+y"]
            return loaded and sharing.base_loads == {"org/a": 1, "org/b": 2} and not sharing.base_closes

        assert _in_child(work) == 0
        done.set()
        assert loader.result().fresh

    def test_inv19_a_cache_that_is_gone_is_not_kept_for_the_sake_of_forks(self, build: FakeBuild) -> None:
        cache = weakref.ref(BackendCache(build=build))
        gc.collect()
        assert cache() is None
        assert _in_child(lambda: True) == 0
