"""Closes: never during a lease, once each, awaited by later requests, and completed even if some raise."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.builds import Listener
from pytest_sway.cache.entries import CachedBackend
from pytest_sway.cache.owners import Owner
from pytest_sway.errors import BackendClosedError, CacheClosedError
from pytest_sway.spec.model_spec import ModelSpec
from tests.unit.fakes import Call, FakeBackend, FakeBuild, Unclosable, Watched, names, spec


def test_inv02_what_is_leased_is_not_closed_to_make_room(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    with cache.lease(spec("a")) as leased:
        for name in "bcdb":
            cache.get_or_load(spec(name))
        assert leased.use() == "a"
    assert build.closes == {"a": [0], "b": [1, 0], "c": [1], "d": [1]}


@pytest.fixture
def _closes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "closes_again", True, raising=False)


@pytest.mark.parametrize("how", ["evict_all", "retire"])
def test_inv02_what_is_leased_is_closed_after_its_last_lease(build: FakeBuild, how: str) -> None:
    cache = BackendCache(build=build)
    first, second = cache.acquire(spec("a")), cache.acquire(spec("a"))
    if how == "retire":
        cache.retire(first.cached)
    else:
        cache.evict_all()
    assert not cache.loaded_keys()
    assert first.backend.use() == "a"
    first.release()
    assert second.backend.use() == "a"
    second.release()
    with pytest.raises(BackendClosedError):
        second.backend.use()
    assert build.closes == {"a": [1]}


def test_inv02_one_lease_of_two_keeps_the_entry(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    watched = Watched(cache)
    first, second = Call(partial(cache.acquire, spec("a"))).result(), Call(partial(cache.acquire, spec("a"))).result()
    rival = Call(partial(cache.acquire, spec("b")))
    watched.until_waiting(1)
    first.release()
    watched.until_waiting(1)
    assert second.backend.use() == "a"
    second.release()
    assert rival.result().backend.use() == "b"


def test_inv03_each_backend_is_closed_exactly_once_after_shutdown(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    for name in "abcab":
        cache.get_or_load(spec(name))
    cache.evict_all()
    cache.get_or_load(spec("d"))
    leased = cache.acquire(spec("e"), holder="a test")
    assert cache.shutdown() == ["a test"]
    assert cache.shutdown() == []
    cache.evict_all()
    leased.release()
    assert {closes for backends in build.closes.values() for closes in backends} == {1}
    assert build.oracle.live == 0
    with pytest.raises(
        CacheClosedError,
        match="the cache was shut down before dummy:org/a was asked for; it serves no more requests",
    ):
        cache.acquire(spec("a"))


def test_inv03_shutdown_waits_for_a_load_under_way_and_closes_what_it_built(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    watched = Watched(cache)
    gate, (leader, waiter) = watched.crowd(build, 1)
    shutdown = Call(cache.shutdown)
    assert isinstance(waiter.error(), CacheClosedError)
    watched.until_waiting(1)
    assert not shutdown.done
    gate.open()
    assert isinstance(leader.error(), CacheClosedError)
    assert str(leader.error()) == "the cache was shut down while dummy:org/a was loading; it serves no more requests."
    assert shutdown.result() == []
    assert build.closes == {"a": [1]}


def test_inv03_a_load_that_ends_after_the_shutdown_gave_up_on_it_is_closed(build: FakeBuild) -> None:
    cache = BackendCache(build=build, lease_timeout=0.0)
    gate = build.load_gate("a")
    leader = Call(partial(cache.acquire, spec("a")))
    gate.wait()
    assert cache.shutdown() == []
    gate.open()
    assert isinstance(leader.error(), CacheClosedError)
    assert build.closes == {"a": [1]}
    assert not cache.loaded_keys()


def test_inv03_shutdown_waits_for_a_close_under_way(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    watched = Watched(cache)
    cache.get_or_load(spec("a"))
    gate = build.close_gate("a")
    evicter = Call(cache.evict_all)
    gate.wait()
    shutdown = Call(cache.shutdown)
    watched.until_waiting(1)
    gate.open()
    shutdown.result()
    evicter.result()
    assert build.closes == {"a": [1]}


def test_inv03_a_shutdown_that_was_interrupted_can_be_called_again(build: FakeBuild) -> None:
    cache = BackendCache(max_size=3, build=build)
    for name in "abc":
        cache.get_or_load(spec(name))
    build.close_errors["b"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        cache.shutdown()
    cache.shutdown()
    assert build.closes == {"a": [1], "b": [1], "c": [1]}


@pytest.mark.usefixtures("_closes_again")
def test_inv03_a_backend_whose_close_was_interrupted_is_not_handed_out_and_closed_later(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    owner = Owner("a test")
    cache.get_or_load(spec("a"))
    build.close_errors["a"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        cache.evict_all()
    assert cache.acquire(spec("a"), owner=owner).backend.use() == "a"
    cache.end(owner)
    assert build.closes == {"a": [2, 0]}


@pytest.mark.usefixtures("_closes_again")
def test_inv03_a_load_after_the_shutdown_whose_close_was_interrupted_is_closed_later(build: FakeBuild) -> None:
    cache = BackendCache(build=build, lease_timeout=0.0)
    gate = build.load_gate("a")
    build.close_errors["a"] = [KeyboardInterrupt()]
    leader = Call(partial(cache.acquire, spec("a")))
    gate.wait()
    cache.shutdown()
    gate.open()
    assert isinstance(leader.error(), KeyboardInterrupt)
    cache.shutdown()
    assert build.closes == {"a": [2]}


def test_inv06_a_request_for_a_closing_backend_waits_and_gets_a_new_one(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    watched = Watched(cache)
    old = cache.get_or_load(spec("a"))
    gate = build.close_gate("a")
    evicter = Call(cache.evict_all)
    gate.wait()
    assert not cache.loaded_keys()
    asker = Call(partial(cache.acquire, spec("a")))
    watched.until_waiting(1)
    assert build.loads == {"a": 1}
    gate.open()
    new = asker.result()
    evicter.result()
    assert new.cached is not old
    assert new.backend.use() == "a"
    assert build.oracle.log == ["load a", "closed a", "load a"]


def test_inv06_what_is_closing_to_make_room_is_not_handed_out(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    watched = Watched(cache)
    cache.get_or_load(spec("a"))
    gate = build.close_gate("a")
    newcomer = Call(partial(cache.get_or_load, spec("b")))
    gate.wait()
    asker = Call(partial(cache.acquire, spec("a")))
    watched.until_waiting(1)
    gate.open()
    assert newcomer.result().backend.name == "b"
    assert asker.result().backend.use() == "a"
    assert build.loads == {"a": 2, "b": 1}
    assert build.oracle.peak == 1


def test_inv11_a_close_that_raises_stop_iteration_is_counted_too(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    cache.get_or_load(spec("a"))
    build.close_errors["a"] = [StopIteration()]
    cache.get_or_load(spec("b"))
    assert cache.stats.close_errors == ["closing dummy:org/a failed: RuntimeError: a close raised StopIteration"]


def test_inv11_a_close_that_raises_fails_no_other_request(build: FakeBuild, caplog: pytest.LogCaptureFixture) -> None:
    evicted: list[str] = []

    class Note(Listener):
        def evicted(self, cached: CachedBackend) -> None:
            evicted.append(cached.backend.name)

    cache = BackendCache(max_size=1, build=build, listener=Note())
    cache.get_or_load(spec("a"))
    build.close_errors["a"] = [RuntimeError("stuck")]
    with caplog.at_level(logging.WARNING), cache.lease(spec("b")) as backend:
        assert backend.use() == "b"
    assert cache.stats.close_errors == ["closing dummy:org/a failed: RuntimeError: stuck"]
    assert caplog.messages == ["closing dummy:org/a failed"]
    assert evicted == ["a"]
    assert names(cache) == ["b"]


def test_inv11_a_close_that_raises_in_a_release_does_not_fail_the_test_that_releases(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    build.close_errors["a"] = [RuntimeError("stuck")]
    with cache.lease(spec("a")):
        cache.evict_all()
    assert cache.stats.close_errors == ["closing dummy:org/a failed: RuntimeError: stuck"]


def test_inv11_a_close_that_raises_after_a_failed_load_is_counted_and_hides_no_error(build: FakeBuild) -> None:
    cache = BackendCache(build=build, lease_timeout=0.0)
    gate = build.load_gate("a")
    build.close_errors["a"] = [RuntimeError("stuck")]
    leader = Call(partial(cache.acquire, spec("a")))
    gate.wait()
    cache.shutdown()
    gate.open()
    assert isinstance(leader.error(), CacheClosedError)
    assert cache.stats.close_errors == ["closing dummy:org/a, which was never handed out, failed: RuntimeError: stuck"]


def test_inv12_a_backend_without_close_is_dropped() -> None:
    built: list[str] = []

    def build(asked: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        built.append(asked.base)
        return Unclosable(asked)

    cache = BackendCache(max_size=1, build=build)
    for name in "aba":
        cache.get_or_load(spec(name))
    assert built == ["org/a", "org/b", "org/a"]
    assert names(cache) == ["a"]
    cache.shutdown()
    assert not cache.ready()
    assert cache.stats.close_errors == []


def test_inv12_a_close_that_is_no_method_is_not_called() -> None:
    class Odd:
        close = "a string"

    cache = BackendCache(max_size=1, build=lambda asked, *, adapter_path=None: Odd())
    cache.get_or_load(spec("a"))
    cache.shutdown()
    assert cache.stats.close_errors == []


def test_inv20_evict_all_closes_every_idle_entry_even_when_some_raise_and_again(build: FakeBuild) -> None:
    cache = BackendCache(max_size=4, build=build)
    held = cache.acquire(spec("a"))
    for name in "bcd":
        cache.get_or_load(spec(name))
    build.close_errors["b"] = [RuntimeError("stuck")]
    build.close_errors["c"] = [ValueError("stuck too")]
    cache.evict_all()
    cache.evict_all()
    assert build.closes == {"a": [0], "b": [1], "c": [1], "d": [1]}
    assert len(cache.stats.close_errors) == 2
    assert not cache.loaded_keys()
    held.release()
    assert build.closes["a"] == [1]
    assert cache.get_or_load(spec("a")).backend.use() == "a"


def test_inv20_evict_all_lets_a_load_under_way_go_on(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    gate = build.load_gate("a")
    leader = Call(partial(cache.acquire, spec("a")))
    gate.wait()
    cache.evict_all()
    gate.open()
    assert leader.result().backend.use() == "a"
    assert names(cache) == ["a"]


def test_inv20_two_threads_may_evict_all_at_once(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    gate = build.close_gate("a")
    for name in "ab":
        cache.get_or_load(spec(name))
    first = Call(cache.evict_all)
    gate.wait()
    Call(cache.evict_all).result()
    gate.open()
    first.result()
    assert build.closes == {"a": [1], "b": [1]}
