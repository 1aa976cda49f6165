"""Room: the bounds by number and by bytes hold; eviction, waiting and refusal."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.cache.budget import Budget, total_bytes
from pytest_sway.cache.entries import Entry, Lease, Operation, SizeByPart, State
from pytest_sway.cache.owners import Owner
from pytest_sway.errors import CacheFullError, SpecError
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.wording import format_bytes
from tests.unit.fakes import DEADLINE, Call, FakeBuild, InformedFakeBuild, Watched, name_of, names, spec


@pytest.mark.parametrize("max_size", [1, 2])
def test_inv04_room_is_freed_before_the_load_begins(build: FakeBuild, max_size: int) -> None:
    cache = BackendCache(max_size=max_size, build=build)
    for name in "abcab":
        cache.get_or_load(spec(name))
    assert build.oracle.peak == max_size
    assert (
        build.oracle.log
        == {
            1: ["load a", "closed a", "load b", "closed b", "load c", "closed c", "load a", "closed a", "load b"],
            2: ["load a", "load b", "closed a", "load c", "closed b", "load a", "closed c", "load b"],
        }[max_size]
    )


@pytest.mark.parametrize("max_size", [1, 2])
def test_inv04_what_is_closing_counts(build: FakeBuild, max_size: int) -> None:
    cache = BackendCache(max_size=max_size, build=build)
    for name in "ab"[:max_size]:
        cache.get_or_load(spec(name))
    gate = build.close_gate("a")
    newcomer = Call(partial(cache.acquire, spec("c")))
    gate.wait()
    assert build.loads["c"] == 0
    assert not newcomer.done
    gate.open()
    assert newcomer.result().backend.use() == "c"
    assert build.oracle.peak == max_size


@pytest.mark.parametrize("max_size", [1, 2])
def test_inv04_what_another_thread_is_closing_counts(build: FakeBuild, max_size: int) -> None:
    cache = BackendCache(max_size=max_size, build=build)
    watched = Watched(cache)
    others = [cache.acquire(spec(name)) for name in "xyz"[1:max_size]]
    a = cache.get_or_load(spec("a"))
    gate = build.close_gate("a")
    retirer = Call(partial(cache.retire, a))
    gate.wait()
    newcomer = Call(partial(cache.acquire, spec("c")))
    watched.until_waiting(1)
    gate.open()
    retirer.result()
    assert newcomer.result().backend.use() == "c"
    assert build.oracle.peak == max_size
    assert len(others) == max_size - 1


@pytest.mark.parametrize("max_size", [1, 2])
def test_inv04_what_is_loading_counts(build: FakeBuild, max_size: int) -> None:
    cache = BackendCache(max_size=max_size, build=build)
    watched = Watched(cache)
    gates = [build.load_gate(name) for name in "ab"[:max_size]]
    loaders = [Call(partial(cache.acquire, spec(name))) for name in "ab"[:max_size]]
    for gate in gates:
        gate.wait()
    newcomer = Call(partial(cache.acquire, spec("c")))
    watched.until_waiting(1)
    assert build.loads["c"] == 0
    for gate in gates:
        gate.open()
    loaders[0].result().release()
    assert newcomer.result().backend.use() == "c"
    assert build.oracle.peak == max_size


@pytest.mark.parametrize("max_size", [1, 2])
def test_inv04_what_was_retired_under_a_lease_counts(build: FakeBuild, max_size: int) -> None:
    cache = BackendCache(max_size=max_size, build=build)
    watched = Watched(cache)
    leases = [Call(partial(cache.acquire, spec(name))).result() for name in "ab"[:max_size]]
    cache.evict_all()
    newcomer = Call(partial(cache.acquire, spec("c")))
    watched.until_waiting(1)
    leases[0].release()
    assert newcomer.result().backend.use() == "c"
    assert build.oracle.peak == max_size
    assert cache.stats.peak_resident == max_size


def test_inv04_many_threads_at_once_stay_within_the_cap(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait(10)
        for step in range(50):
            with cache.lease(spec("abcde"[(number + step * step) % 5])) as backend:
                backend.use()

    for call in [Call(partial(work, number)) for number in range(8)]:
        call.result()
    cache.shutdown()
    assert build.oracle.peak == 2
    assert build.oracle.live == 0


def test_inv07_the_victim_is_the_least_recently_used(build: FakeBuild) -> None:
    cache = BackendCache(max_size=3, build=build)
    for name in "abcad":
        cache.get_or_load(spec(name))
    assert names(cache) == ["c", "a", "d"]
    assert build.oracle.log[-2:] == ["closed b", "load d"]


def test_inv07_what_is_leased_is_passed_over(build: FakeBuild) -> None:
    cache = BackendCache(max_size=3, build=build)
    with cache.lease(spec("a")):
        for name in "bcd":
            cache.get_or_load(spec(name))
        assert names(cache) == ["a", "c", "d"]


def test_inv07_what_is_loading_is_never_a_victim(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    gate = build.load_gate("a")
    loader = Call(partial(cache.acquire, spec("a")))
    gate.wait()
    for name in "bcd":
        cache.get_or_load(spec(name))
    gate.open()
    assert loader.result().backend.use() == "a"
    assert build.loads["a"] == 1
    assert names(cache) == ["d", "a"]


def test_inv07_no_more_goes_than_must(build: FakeBuild) -> None:
    cache = BackendCache(max_size=3, build=build)
    for name in "abc":
        cache.get_or_load(spec(name))
    cache.get_or_load(spec("d"))
    assert build.closes == {"a": [1], "b": [0], "c": [0], "d": [0]}
    assert cache.stats.total().evictions == 1


def test_inv16_a_swap_of_adapters_at_max_size_1_never_reloads_the_base(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=1, build=sharing)
    for name in ("a+x", "a+y", "a+x", "a", "a+y"):
        assert cache.get_or_load(spec(name)).backend.use() == name
    assert sharing.base_loads == {"org/a": 1}
    assert not sharing.base_closes
    assert sharing.oracle.peak == 1
    cache.shutdown()
    assert sharing.base_closes == {"org/a": 1}


def test_inv16_a_base_goes_with_its_last_adapter(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=2, build=sharing)
    for name in ("a+x", "a+y", "b"):
        cache.get_or_load(spec(name))
    assert not sharing.base_closes
    cache.get_or_load(spec("c"))
    assert sharing.base_closes == {"org/a": 1}
    assert sharing.base_loads == {"org/a": 1, "org/b": 1, "org/c": 1}


def test_inv16_two_threads_load_two_adapters_on_one_base_load(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=2, build=sharing)
    gates = [sharing.load_gate(name) for name in ("a+x", "a+y")]
    calls = [Call(partial(cache.acquire, spec(name))) for name in ("a+x", "a+y")]
    for gate in gates:
        gate.wait()
    for gate in gates:
        gate.open()
    for call in calls:
        call.result()
    assert sharing.base_loads == {"org/a": 1}


def test_inv16_a_shared_base_counts_once(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=4, max_bytes=120, build=sharing)
    cache.get_or_load(spec("a+x"))
    cache.get_or_load(spec("a+y"))
    assert names(cache) == ["a+x", "a+y"]
    assert cache.stats.peak_bytes == 120
    cache.get_or_load(spec("a+z"))
    assert names(cache) == ["a+y", "a+z"]
    assert sharing.base_loads == {"org/a": 1}


def test_inv17_a_request_fails_at_once_if_the_caller_holds_everything(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build, lease_timeout=1000)
    sentence = (
        "there is no room to load dummy:org/c: the cache holds 2 of at most 2 backends, and all of them are in use"
        " by the caller: dummy:org/a + nowhere/x (held by tests/test_a.py::test_it); dummy:org/b (held by a"
        " fixture). Release one of them first, or raise the size of the cache."
    )

    def ask_for_more_than_there_is() -> None:
        with cache.lease(spec("a+x"), holder="tests/test_a.py::test_it"), cache.lease(spec("b"), holder="a fixture"):
            assert cache.get_or_load(spec("b")).backend.use() == "b"  # a loaded backend is served all the same
            cache.acquire(spec("c"))

    with pytest.raises(CacheFullError, match=f"^{re.escape(sentence)}$"):
        Call(ask_for_more_than_there_is).result()
    assert build.loads["c"] == 0
    assert cache.get_or_load(spec("c")).backend.use() == "c"


def test_inv17_it_waits_when_others_hold_it(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    watched = Watched(cache)
    held = Call(partial(cache.acquire, spec("a"))).result()
    asker = Call(partial(cache.acquire, spec("b")))
    watched.until_waiting(1)
    held.release()
    assert asker.result().backend.use() == "b"


def test_inv17_it_waits_when_another_holds_a_part_of_it(build: FakeBuild) -> None:
    cache = BackendCache(max_size=2, build=build)
    watched = Watched(cache)
    held = Call(partial(cache.acquire, spec("a"))).result()

    def ask() -> str:
        with cache.lease(spec("b")), cache.lease(spec("c")) as backend:
            return str(backend.use())

    asker = Call(ask)
    watched.until_waiting(1)
    held.release()
    assert asker.result() == "c"


def test_inv17_it_waits_until_its_deadline(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build, lease_timeout=0.05)
    held = Call(partial(cache.acquire, spec("a"), holder="another test")).result()
    sentence = (
        "there is no room to load dummy:org/b: the cache holds 1 of at most 1 backends, and none of them was released"
        " within 0.05 s: dummy:org/a (held by another test). Release one of them first, or raise the size of the cache."
    )
    with pytest.raises(CacheFullError, match=f"^{re.escape(sentence)}$"):
        Call(partial(cache.acquire, spec("b"))).result()
    held.release()
    assert cache.get_or_load(spec("b")).backend.use() == "b"


def test_inv17_a_caller_that_holds_the_room_for_a_load_it_waits_for_waits_until_the_deadline(build: FakeBuild) -> None:
    """Another thread leads the load that both threads request."""
    cache = BackendCache(max_size=1, build=build, lease_timeout=2)
    watched = Watched(cache)
    with cache.lease(spec("a"), holder="a test"):
        leader = Call(partial(cache.acquire, spec("b")))
        watched.until_waiting(1)
        sentence = r"none of them was released within 2 s: dummy:org/a \(held by a test\)"
        with pytest.raises(CacheFullError, match=sentence):
            cache.acquire(spec("b"))
        assert isinstance(leader.error(), CacheFullError)


def test_inv17_waiters_for_a_load_without_room_get_its_error(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build, lease_timeout=2)
    watched = Watched(cache)
    with cache.lease(spec("a")):
        calls = [Call(partial(cache.acquire, spec("b"))) for _ in range(3)]
        watched.until_waiting(3)
        errors = {id(call.error()) for call in calls}
    assert len(errors) == 1
    assert build.loads["b"] == 0


def test_inv17_the_lease_of_a_thread_that_ended_is_not_taken_for_that_of_the_next(build: FakeBuild) -> None:
    """Thread numbers are reused."""
    cache = BackendCache(max_size=1, build=build)
    watched = Watched(cache)
    held = Call(partial(cache.acquire, spec("a"))).result()
    askers = [Call(partial(cache.get_or_load, spec("b"))) for _ in range(3)]
    watched.until_waiting(3)
    held.release()
    assert {asker.result().backend.use() for asker in askers} == {"b"}


def test_inv17_the_lease_that_a_thread_has_left_is_not_waited_for_in_the_main_thread(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build, lease_timeout=0.5)
    held = Call(partial(cache.acquire, spec("a"), holder="a thread that has ended")).result()
    sentence = "all of them are in use by the caller; a thread ended without releasing its lease"
    with pytest.raises(CacheFullError, match=rf"{sentence}: dummy:org/a \(held by a thread that has ended\)"):
        cache.acquire(spec("b"))
    held.release()
    assert cache.get_or_load(spec("b")).backend.use() == "b"


def test_inv17_the_lease_that_a_thread_has_left_is_not_waited_for_as_long_in_other_threads(
    build: FakeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sway.cache.ledger._PATIENCE_WITH_ENDED_THREADS", 0.1)
    monkeypatch.setattr("pytest_sway.cache.backend_cache._GLANCE", 0.01)
    cache = BackendCache(max_size=1, build=build, lease_timeout=2 * DEADLINE)
    held = Call(partial(cache.acquire, spec("a"), holder="a thread that has ended")).result()
    asker = Call(partial(cache.get_or_load, spec("b")))
    with pytest.raises(
        CacheFullError, match=r"none of them was released within 0.1 s; a thread ended without releasing its lease"
    ):
        asker.result()
    held.release()
    assert cache.get_or_load(spec("b")).backend.use() == "b"


def test_inv17_a_thread_that_ends_while_its_lease_is_waited_for_is_noticed(
    build: FakeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sway.cache.backend_cache._GLANCE", 0.01)  # nobody announces the end of a thread
    cache = BackendCache(max_size=1, build=build, lease_timeout=1000)
    watched = Watched(cache)
    held, may_end = threading.Event(), threading.Event()

    def lease_and_end() -> Lease:
        lease = cache.acquire(spec("a"))
        held.set()
        assert may_end.wait(DEADLINE)
        return lease

    holder = Call(lease_and_end)
    assert held.wait(DEADLINE)
    watched.on_wait = may_end.set
    with pytest.raises(CacheFullError, match="a thread ended without releasing its lease"):
        cache.acquire(spec("b"))
    holder.result().release()


@pytest.mark.parametrize("ended", [False, True], ids=["thread alive", "thread ended"])
def test_inv17_what_a_test_keeps_to_its_end_is_its_own_in_all_its_threads(build: FakeBuild, ended: bool) -> None:
    cache = BackendCache(max_size=1, build=build, lease_timeout=0.5)
    keep = partial(cache.acquire, owner=Owner("a test", keeps=True))
    may_end, held = threading.Event(), threading.Event()

    def lease_and_stay() -> Lease:
        lease = keep(spec("a"))
        held.set()
        assert ended or may_end.wait(DEADLINE)
        return lease

    other = Call(lease_and_stay)
    assert held.wait(DEADLINE)
    if ended:
        other.result()
    for ask in (keep, partial(cache.acquire, holder="a test")):
        with pytest.raises(CacheFullError, match=r"in use by the caller: dummy:org/a \(held by a test\)"):
            ask(spec("b"))
    may_end.set()
    other.result().release()
    assert keep(spec("b")).backend.use() == "b"


def test_inv17_another_test_waits_for_that_end(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    watched = Watched(cache)
    held = Call(partial(cache.acquire, spec("a"), owner=Owner("a test", keeps=True))).result()
    asker = Call(partial(cache.acquire, spec("b"), owner=Owner("another test", keeps=True)))
    watched.until_waiting(1)
    held.release()
    assert asker.result().backend.use() == "b"


def test_inv17_a_lease_that_was_dropped_comes_free(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    cache.acquire(spec("a"))
    assert cache.acquire(spec("b")).backend.use() == "b"
    assert not cache.leased()


def test_inv18_estimates_make_room_before_the_load(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=9, max_bytes=250, build=sharing)
    for name in "abc":
        cache.get_or_load(spec(name))
    assert sharing.oracle.log == ["load a", "load b", "closed a", "load c"]
    assert cache.stats.peak_bytes == 200


def test_inv18_what_is_over_the_whole_budget_is_refused_before_anything_is_evicted(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=9, max_bytes=2 << 20, build=sharing)
    cache.get_or_load(spec("a"))
    sharing.estimates["b"] = {"b": 3 << 20}
    sentence = (
        "dummy:org/b takes 3.0 MiB, more than the whole budget of 2.0 MiB; nothing was evicted for it. Raise the"
        " budget, or use a smaller dtype or model."
    )
    with pytest.raises(CacheFullError, match=f"^{re.escape(sentence)}$"):
        cache.acquire(spec("b"))
    assert sharing.loads == {"a": 1}
    assert names(cache) == ["a"]


def test_inv18_what_is_exactly_the_budget_fits(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=9, max_bytes=200, build=sharing)
    for name in "ab":
        cache.get_or_load(spec(name))
    assert names(cache) == ["a", "b"]


def test_inv18_an_unknown_size_counts_as_the_whole_budget(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=9, max_bytes=1000, build=sharing)
    cache.get_or_load(spec("a"))
    sharing.estimates["b"] = None
    cache.get_or_load(spec("b"))
    assert sharing.oracle.log == ["load a", "closed a", "load b"]
    cache.get_or_load(spec("c"))
    assert sharing.oracle.log == ["load a", "closed a", "load b", "closed b", "load c"]


def test_inv18_a_size_that_was_unknown_counts_as_measured_after_the_load(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=9, max_bytes=1000, build=sharing)
    sharing.estimates["a"] = None
    sharing.sizes["a"] = {"a": 300}
    for name in "ab":
        cache.get_or_load(spec(name))
    assert names(cache) == ["a", "b"]


def test_inv18_a_size_that_cannot_be_measured_stays_as_estimated(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=9, max_bytes=200, build=sharing)
    sharing.sizes["a"] = None
    for name in "ab":
        cache.get_or_load(spec(name))
    assert names(cache) == ["a", "b"]


def test_inv18_what_turns_out_larger_is_charged_at_once(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=9, max_bytes=300, build=sharing)
    for name in "ab":
        cache.get_or_load(spec(name))
    sharing.sizes["c"] = {"c": 250}
    cache.get_or_load(spec("c"))
    assert names(cache) == ["c"]
    assert sharing.closes == {"a": [1], "b": [1], "c": [0]}


def test_inv18_what_turns_out_larger_beside_what_is_leased_still_drives_out_what_is_idle(
    sharing: InformedFakeBuild,
) -> None:
    cache = BackendCache(max_size=9, max_bytes=300, build=sharing)
    with cache.lease(spec("a")):
        cache.get_or_load(spec("b"))
        sharing.sizes["c"] = {"c": 250}
        cache.get_or_load(spec("c"))
        assert names(cache) == ["a", "c"]


def test_inv18_what_turns_out_larger_than_the_whole_budget_is_closed_and_refused(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=9, max_bytes=300, build=sharing)
    sharing.sizes["a"] = {"a": 301}
    sentence = (
        "dummy:org/a takes 301 B after its load, more than the whole budget of 300 B. Raise the budget, or use a"
        " smaller dtype or model."
    )
    with pytest.raises(CacheFullError, match=f"^{re.escape(sentence)}$"):
        cache.acquire(spec("a"))
    assert sharing.closes == {"a": [1]}
    assert not cache.ready()


@pytest.mark.parametrize(
    ("held", "known"), [({"a": 100}, "100 B"), (None, "an unknown number of bytes")], ids=["known", "unknown"]
)
def test_inv18_a_refusal_for_bytes_names_the_bytes(
    sharing: InformedFakeBuild, held: SizeByPart | None, known: str
) -> None:
    cache = BackendCache(max_size=9, max_bytes=150, build=sharing)
    sharing.estimates["a"] = held
    with (
        cache.lease(spec("a")),
        pytest.raises(CacheFullError, match=f"holds 1 of at most 9 backends with {known} of at most 150 B, and all"),
    ):
        cache.acquire(spec("b"))


def test_inv18_what_can_be_checked_is_checked_before_anything_is_evicted(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=1, build=sharing)
    cache.get_or_load(spec("a"))
    sharing.check_errors["b"] = [SpecError("no such base")]
    with pytest.raises(SpecError, match=r"^no such base$"):
        cache.acquire(spec("b"))
    assert names(cache) == ["a"]
    assert sharing.loads == {"a": 1}
    assert cache.get_or_load(spec("b")).backend.use() == "b"


@pytest.mark.parametrize("max_size", [0, -1, True, 1.5, "2", None])
def test_a_size_below_one_is_refused(max_size: int) -> None:
    with pytest.raises(ValueError, match=f"^max_size must be a whole number of at least 1; found {max_size!r}.$"):
        BackendCache(max_size=max_size, build=FakeBuild())


@pytest.mark.parametrize("max_bytes", [0, -5])
def test_a_budget_below_one_byte_is_refused(max_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"^max_bytes must be at least 1, or None for no bound; found {max_bytes}.$"):
        BackendCache(max_bytes=max_bytes, build=FakeBuild())


def test_bounds_are_readable(build: FakeBuild) -> None:
    cache = BackendCache(max_size=3, max_bytes=5, build=build)
    assert (cache.max_size, cache.max_bytes) == (3, 5)
    assert BackendCache(build=build).max_size == 2
    assert BackendCache(build=build).max_bytes is None


def _entry(name: str, parts: SizeByPart | None) -> Entry:
    return Entry((name,), spec(name), Operation("test"), State.READY, parts=parts)


def test_parts_that_are_shared_count_once_at_their_largest() -> None:
    entries = [_entry("a", {"base": 100, "x": 1}), _entry("b", {"base": 120, "y": 2})]
    assert total_bytes(entries) == 123
    assert total_bytes([*entries, _entry("c", None)]) is None
    assert total_bytes([]) == 0


def test_a_budget_evicts_only_as_much_as_it_must() -> None:
    budget = Budget(max_size=3, max_bytes=100)
    residents = [_entry("a", {"a": 30}), _entry("b", {"b": 30}), _entry("c", {"c": 30})]
    assert budget.victims(residents, _entry("d", {"d": 30})) == residents[:1]
    assert budget.victims(residents, _entry("d", {"d": 50})) == residents[:2]
    assert budget.victims(residents, _entry("d", None)) == residents
    assert budget.victims([], _entry("d", {"d": 1000})) == []


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 42, "4096.0 GiB"),
    ],
)
def test_bytes_are_written_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


class _OutOfMemory:
    """A build that runs out of memory beyond ``fits`` backends, whatever the cache's budget."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.alive: list[str] = []
        self.tries: list[str] = []

    def __call__(self, asked: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        name = name_of(asked)
        self.tries.append(name)
        if len(self.alive) >= self.fits:
            raise MemoryError("the device is full")
        self.alive.append(name)
        return SimpleNamespace(close=lambda: self.alive.remove(name))


def test_a_load_that_runs_out_of_memory_is_tried_once_more_without_what_is_idle() -> None:
    build = _OutOfMemory(fits=2)
    cache = BackendCache(max_size=4, build=build)
    for name in ("a", "b", "c"):
        cache.get_or_load(spec(name))
    assert build.tries == ["a", "b", "c", "c"]
    assert names(cache) == ["c"]
    assert build.alive == ["c"]


def test_a_failed_try_whose_parts_refer_to_each_other_is_freed_before_the_second() -> None:
    class Part:
        whole: Any = None

    halves: list[weakref.ref[Part]] = []
    freed: list[bool] = []

    def build(asked: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        freed.extend(half() is None for half in halves)
        if not halves:
            part = Part()
            part.whole = part
            halves.append(weakref.ref(part))
            raise MemoryError("the device is full")
        return SimpleNamespace(close=lambda: None)

    gc.disable()
    try:
        BackendCache(max_size=1, build=build).get_or_load(spec("a"))
    finally:
        gc.enable()
    assert freed == [True]


def test_out_of_memory_twice_names_the_size_and_the_loaded_backends() -> None:
    build = _OutOfMemory(fits=1)
    cache = BackendCache(max_size=4, build=build)
    with cache.lease(spec("a"), holder="test_x"):
        with pytest.raises(CacheFullError) as caught:
            cache.get_or_load(spec("b"))
        assert str(caught.value) == (
            "loading dummy:org/b (an unknown size) ran out of memory on device auto twice. All idle backends were"
            " closed before the second try; still loaded: dummy:org/a, an unknown size (held by test_x)."
            " Use a smaller dtype or model, or release a backend."
        )
    assert build.tries == ["a", "b", "b"]
    assert names(cache) == ["a"]
