"""Loads: one per key at a time, shared by waiters; failures, interrupts and loads that wait for themselves."""

from __future__ import annotations

import re
import threading
from functools import partial
from pathlib import Path

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.builds import Listener
from pytest_sway.cache.entries import CachedBackend, Lease
from pytest_sway.errors import BackendLoadError, CacheDeadlockError, CacheFullError, SpecError
from tests.unit.fakes import Call, FakeBuild, InformedFakeBuild, Watched, spec


def test_inv01_all_waiters_for_a_load_get_its_object(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    gate, (leader, *waiters) = Watched(cache).crowd(build, 5)
    gate.open()
    cached = leader.result().cached
    assert [waiter.result().cached for waiter in waiters] == [cached] * 5
    assert build.loads == {"a": 1}
    assert cache.stats.backend(str(spec("a"))).hits == 5


def test_inv01_a_request_in_the_same_thread_is_a_hit(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    assert cache.get_or_load(spec("a")) is cache.get_or_load(spec("a"))
    assert build.loads == {"a": 1}


def test_inv01_loads_of_different_keys_run_side_by_side(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    gates = [build.load_gate(name) for name in "ab"]
    calls = [Call(partial(cache.acquire, spec(name))) for name in "ab"]
    for gate in gates:
        gate.wait()
    for gate in gates:
        gate.open()
    assert [call.result().backend.name for call in calls] == ["a", "b"]


def test_inv01_hits_are_served_while_another_key_loads_and_a_third_closes(build: FakeBuild) -> None:
    cache = BackendCache(max_size=3, build=build)
    closing = build.close_gate("old")
    loading = build.load_gate("b")
    for name in ("old", "a"):
        cache.get_or_load(spec(name))
    old = cache.get_or_load(spec("old"))
    retirer = Call(partial(cache.retire, old))
    closing.wait()
    loader = Call(partial(cache.acquire, spec("b")))
    loading.wait()
    assert cache.get_or_load(spec("a")).backend.use() == "a"
    for gate in (closing, loading):
        gate.open()
    retirer.result()
    loader.result()


def test_inv05_a_waiter_holds_the_entry_before_another_request_can_evict_it(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    watched = Watched(cache)
    gate = build.load_gate("a")
    leader = Call(partial(cache.get_or_load, spec("a")))  # releases at once
    gate.wait()
    waiter = Call(partial(cache.acquire, spec("a")))
    watched.until_waiting(1)
    rival = Call(partial(cache.acquire, spec("b")))
    watched.until_waiting(2)
    gate.open()
    leader.result()
    lease = waiter.result()
    assert lease.backend.use() == "a"  # never closed in between
    assert build.closes == {"a": [0]}
    lease.release()
    assert rival.result().backend.use() == "b"
    assert build.closes == {"a": [1], "b": [0]}


def test_inv05_leases_of_waiters_exist_when_the_entry_becomes_ready(build: FakeBuild) -> None:
    """The leader's callback runs before any waiter can run: the waiters' claims exist already."""
    claims: list[int] = []

    class Count(Listener):
        def loaded(self, cached: CachedBackend) -> None:
            claims.extend(len(entry.claims) for entry in cache._ledger._entries.values())

    cache = BackendCache(build=build, listener=Count())
    gate, calls = Watched(cache).crowd(build, 3)
    gate.open()
    leases = [call.result() for call in calls]
    assert claims == [4]
    assert len(leases) == 4


def test_a_failed_load_leads_to_no_code_of_the_standard_library(build: FakeBuild) -> None:
    build.load_errors["a"] = [SpecError("no such base")]
    with pytest.raises(SpecError) as caught, BackendCache(build=build).lease(spec("a")):
        pass
    assert "contextlib.py" not in {Path(entry.path).name for entry in caught.traceback}


def test_inv09_leader_and_waiters_get_the_error_of_one_load_and_the_next_call_tries_again(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    build.load_errors["a"] = [SpecError("no such base")]
    gate, calls = Watched(cache).crowd(build, 3)
    gate.open()
    errors = [call.error() for call in calls]
    assert all(error is errors[0] for error in errors)
    assert isinstance(errors[0], SpecError)
    assert str(errors[0]) == "no such base"
    assert build.loads == {"a": 1}
    assert cache.stats.backend(str(spec("a"))).failures == 1
    assert cache.get_or_load(spec("a")).backend.use() == "a"
    assert build.loads == {"a": 2}


def test_inv09_an_error_of_another_type_is_wrapped_with_its_cause(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    build.load_errors["a+x"] = [ZeroDivisionError("by zero")]
    sentence = "loading the dummy backend of base 'org/a' with adapter '/nowhere/x' failed: ZeroDivisionError: by zero"
    with pytest.raises(BackendLoadError, match=f"^{re.escape(sentence)}$") as raised:
        cache.acquire(spec("a+x"))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_inv09_what_a_check_finds_wrong_counts_as_a_failed_load(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(build=sharing)
    sharing.check_errors["a"] = [SpecError("no such base")]
    with pytest.raises(SpecError):
        cache.acquire(spec("a"))
    assert cache.stats.backend(str(spec("a"))).failures == 1


def test_inv09_a_refusal_for_want_of_room_counts_as_no_failed_load(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    with cache.lease(spec("a")), pytest.raises(CacheFullError):
        cache.acquire(spec("b"))
    assert cache.stats.total().failures == 0


def test_inv09_a_failed_load_leaves_its_room_to_others(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    build.load_errors["a"] = [RuntimeError("broken")]
    with pytest.raises(BackendLoadError, match="broken"):
        cache.acquire(spec("a"))
    with cache.lease(spec("b")) as backend:
        assert backend.use() == "b"
    assert build.oracle.peak == 1


@pytest.mark.parametrize("where", ["measure", "listener"])
def test_inv09_what_was_built_is_closed_when_something_fails_after_the_build(
    sharing: InformedFakeBuild, where: str
) -> None:
    class Raising(Listener):
        def loaded(self, cached: CachedBackend) -> None:
            if where == "listener":
                raise RuntimeError("broken listener")

    cache = BackendCache(max_size=1, build=sharing, listener=Raising())
    if where == "measure":
        sharing.measure_errors["a"] = [RuntimeError("broken measure")]
    with pytest.raises((BackendLoadError, RuntimeError), match=f"broken {where}"):
        cache.acquire(spec("a"))
    assert not cache.leased()
    cache.shutdown()
    assert sharing.closes == {"a": [1]}
    assert sharing.base_closes == {"org/a": 1}


def test_inv10_an_interrupt_in_the_close_of_what_a_failed_load_left_leaves_its_room_to_others(
    sharing: InformedFakeBuild,
) -> None:
    cache = BackendCache(max_size=1, build=sharing)
    sharing.measure_errors["a"] = [RuntimeError("broken measure")]
    sharing.close_errors["a"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        cache.acquire(spec("a"))
    with cache.lease(spec("b")) as backend:
        assert backend.use() == "b"


def test_inv09_a_request_without_room_gives_its_error_to_no_other(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    watched = Watched(cache)
    held = cache.acquire(spec("a"), holder="me")
    other = Call(partial(cache.acquire, spec("b")))
    watched.until_waiting(1)
    with pytest.raises(CacheFullError, match="in use by the caller"):
        cache.acquire(spec("c"))
    held.release()
    assert other.result().backend.use() == "b"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_inv10_an_interrupt_goes_up_where_it_struck_and_a_waiter_takes_over(
    build: FakeBuild, interrupt: type[BaseException]
) -> None:
    cache = BackendCache(max_size=1, build=build)
    build.load_errors["a"] = [interrupt()]
    gate, (leader, *waiters) = Watched(cache).crowd(build, 3)
    gate.open()
    assert isinstance(leader.error(), interrupt)
    leases = [waiter.result() for waiter in waiters]
    assert len({id(lease.backend) for lease in leases}) == 1
    assert build.loads == {"a": 2}
    assert build.oracle.peak == 1
    assert cache.stats.backend(str(spec("a"))).failures == 0


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_inv10_an_interrupt_that_quotes_a_secret_goes_up_as_the_same_object_without_it(
    build: FakeBuild, interrupt: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345678")
    raised = interrupt("401 for hf_abcdefgh12345678")
    build.load_errors["a"] = [raised]
    with pytest.raises(interrupt) as caught:
        BackendCache(build=build).acquire(spec("a"))
    assert caught.value is raised
    assert str(raised) == "401 for ***"
    assert getattr(raised, "code", "401 for ***") == "401 for ***"  # Python prints it at the end


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_inv10_an_interrupt_while_waiting_leaves_the_load_to_the_others(
    build: FakeBuild, interrupt: type[BaseException]
) -> None:
    cache = BackendCache(build=build)
    watched = Watched(cache)
    gate = build.load_gate("a")
    leader = Call(partial(cache.acquire, spec("a")))
    gate.wait()

    def interrupted() -> None:
        raise interrupt

    watched.on_wait = interrupted
    with pytest.raises(interrupt):
        cache.acquire(spec("a"))
    watched.on_wait = lambda: None
    assert not any(entry.waiters for entry in cache._ledger._entries.values())
    gate.open()
    leader.result().release()
    assert not cache.leased()


def test_inv14_a_load_that_waits_for_itself_gets_an_error(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    build.inside["a"] = lambda: cache.acquire(spec("a"))
    sentence = (
        "the load of dummy:org/a asks the cache for the same spec, so it would wait for itself forever. A build may ask"
        " for other specs, but not for its own."
    )
    with pytest.raises(CacheDeadlockError, match=f"^{re.escape(sentence)}$"):
        Call(partial(cache.acquire, spec("a"))).result()
    assert not cache.loaded_keys()


def test_inv14_a_load_may_ask_for_another_key(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    inner: list[Lease] = []
    build.inside["a"] = lambda: inner.append(cache.acquire(spec("b")))
    with cache.lease(spec("a")) as backend:
        assert backend.use() == "a"
        assert inner[0].backend.use() == "b"


def test_inv14_a_load_that_asks_for_another_key_without_room_for_both_gets_an_error(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    build.inside["a"] = lambda: cache.acquire(spec("b"))
    with pytest.raises(CacheFullError, match=r"in use by the caller: dummy:org/a \(loading\)"):
        cache.acquire(spec("a"))


def test_inv14_two_loads_that_ask_for_each_other_do_not_wait_forever(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    met = threading.Barrier(2)

    def ask(name: str) -> None:
        met.wait(10)
        cache.acquire(spec(name))

    build.inside = {"a": partial(ask, "b"), "b": partial(ask, "a")}
    calls = [Call(partial(cache.acquire, spec(name))) for name in "ab"]
    errors = [call.error() for call in calls]
    assert any(isinstance(error, CacheDeadlockError) for error in errors)
    cache.shutdown()
    assert build.oracle.live == 0


def test_inv14_a_close_that_waits_for_itself_gets_an_error(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    cache.get_or_load(spec("a"))
    build.inside_close["a"] = lambda: cache.acquire(spec("a"))
    cache.evict_all()
    assert cache.stats.close_errors == [
        "closing dummy:org/a failed: CacheDeadlockError: the close() of dummy:org/a asks the cache for the same spec,"
        " so it would wait for itself forever."
    ]


def test_inv14_a_granted_waiter_no_longer_counts_as_waiting(build: FakeBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that loaded b asks for a, before the thread that loads a and was granted b can run."""

    class AskBack(Listener):
        def loaded(self, cached: CachedBackend) -> None:
            if cached.model_spec == spec("b"):
                cache.acquire(spec("a")).release()

    cache = BackendCache(max_size=2, build=build, listener=AskBack())
    watched = Watched(cache)
    build.inside["a"] = lambda: cache.acquire(spec("b")).release()
    gate = build.load_gate("b")
    b = Call(partial(cache.acquire, spec("b")))
    gate.wait()
    a = Call(partial(cache.acquire, spec("a")))
    watched.until_waiting(1)
    with monkeypatch.context() as nobody_runs:
        nobody_runs.setattr(cache._ledger, "_announce", lambda: None)
        gate.open()
        watched.until_waiting(2)
    with cache._ledger._lock:
        cache._ledger._announce()
    assert b.result().backend.use() == "b"
    assert a.result().backend.use() == "a"


def test_the_seconds_of_imports_are_no_part_of_a_load(build: FakeBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_sway.system.imports._seconds", seconds := [3.0])
    build.inside["a"] = lambda: seconds.append(1000.0)
    cache = BackendCache(build=build)
    assert cache.get_or_load(spec("a")).load_seconds == 0.0
    assert cache.get_or_load(spec("b")).load_seconds > 0.0
    assert cache.stats.total().load_seconds < 1000.0
