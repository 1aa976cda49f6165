"""Leases end with the test or wider fixture that took them, in any thread."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Suite


def test_a_backend_had_in_another_thread_is_not_waited_for_by_its_own_test(suite: Suite) -> None:
    result = suite.run(
        """
import asyncio
from concurrent.futures import ThreadPoolExecutor
from pytest_sway.errors import CacheFullError

def test_thread_ended(sway_backend):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(sway_backend, dummy("a")).result()
    with pytest.raises(CacheFullError, match="all of them are in use by the caller"):
        sway_backend(dummy("b"))

def test_thread_alive(sway_backend):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(sway_backend, dummy("a")).result()
        with pytest.raises(CacheFullError, match="all of them are in use by the caller"):
            sway_backend(dummy("b"))

def test_both_in_threads(sway_backend):
    async def both():
        await asyncio.to_thread(sway_backend, dummy("a"))
        await asyncio.to_thread(sway_backend, dummy("b"))
    with pytest.raises(CacheFullError, match="all of them are in use by the caller"):
        asyncio.run(both())

def test_next(sway_backend):
    sway_backend(dummy("b"))
""",
        "--sway-cache-size=1",
    )
    result.assert_outcomes(passed=4)
    assert suite.events() == ["load a", "close a", "load b", "close b"]


def test_two_threads_of_a_test_get_the_same_backend(suite: Suite) -> None:
    result = suite.run(
        """
import threading
from concurrent.futures import ThreadPoolExecutor

def test_many(sway_backend):
    together = threading.Barrier(8)
    def ask():
        together.wait(20)
        return sway_backend(dummy("a"))
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
    assert len({id(each.result()) for each in asked}) == 1

def test_next(sway_backend):
    sway_backend(dummy("b"))
""",
        "--sway-cache-size=1",
    )
    result.assert_outcomes(passed=2)
    assert suite.events() == ["load a", "close a", "load b", "close b"]


@pytest.mark.parametrize("ask", ["sway_backend(dummy('slow'))", "sway_cache.lease(dummy('slow')).__enter__()"])
def test_a_load_under_way_in_a_thread_when_its_test_ends_is_pinned_by_nobody(suite: Suite, ask: str) -> None:
    suite.pytester.makepyfile(
        slow="""
import threading
import pytest

REACHED, GO, ENDED = threading.Event(), threading.Event(), threading.Event()

@pytest.hookimpl(tryfirst=True)
def pytest_sway_build_backend(spec):
    if spec.base == "slow":
        REACHED.set()
        assert GO.wait(20)
"""
    )
    result = suite.run(
        """
import threading
import slow

ERRORS = []
LIVES_ON = threading.Event()

def test_leaves_a_thread(sway_backend, sway_cache):
    def work():
        try:
            ASK
        except Exception as error:
            ERRORS.append(error)
        slow.ENDED.set()
        LIVES_ON.wait(20)
    threading.Thread(target=work, daemon=True).start()
    assert slow.REACHED.wait(20)

def test_next(sway_backend):
    slow.GO.set()
    assert slow.ENDED.wait(20)
    sway_backend(dummy("b"))
    assert type(ERRORS[0]).__name__ == "BackendUseError"
    assert "test_suite.py::test_leaves_a_thread has ended, but one of its threads" in str(ERRORS[0])
    LIVES_ON.set()
""".replace("ASK", ask),
        "--sway-cache-size=1",
        "-p",
        "slow",
    )
    result.assert_outcomes(passed=2)
    assert suite.events() == ["load slow", "close slow", "load b", "close b"]


def test_a_lease_of_the_cache_that_a_thread_has_left_is_named_and_not_waited_for(suite: Suite) -> None:
    result = suite.run(
        """
from concurrent.futures import ThreadPoolExecutor
from pytest_sway.errors import CacheFullError

def test_forgets(sway_cache, sway_backend):
    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(sway_cache.acquire, dummy("a")).result()
    with pytest.raises(CacheFullError, match="without releasing its lease: dummy:a .held by .*::test_forgets"):
        sway_backend(dummy("b"))
    left.release()
    sway_backend(dummy("b"))
""",
        "--sway-cache-size=1",
    )
    result.assert_outcomes(passed=1)


KEPT = {
    "a lease": "KEEP.append(sway_cache.acquire(dummy('a')))",
    "a block": "KEEP.append(sway_cache.lease(dummy('a'))); KEEP[0].__enter__()",
    "a stack": "KEEP.append(ExitStack()); KEEP[0].enter_context(sway_cache.lease(dummy('a')))",
    "a generator": "KEEP.append(held(sway_cache)); next(KEEP[0])",
    "an ended thread": "in_a_thread(lambda: KEEP.append(sway_cache.acquire(dummy('a')))).join()",
    "a living thread": "in_a_thread(lambda: (KEEP.append(sway_cache.acquire(dummy('a'))), HAS.set(), END.wait(20)))\n"
    "    HAS.wait(20)",
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_a_lease_of_the_cache_ends_with_its_test(suite: Suite, keep: str) -> None:
    result = suite.run(
        """
import threading
from contextlib import ExitStack
from pytest_sway.errors import BackendClosedError

KEEP, HAS, END = [], threading.Event(), threading.Event()

def held(cache):
    with cache.lease(dummy("a")) as backend:
        yield backend

def in_a_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread

def test_keeps(sway_cache):
    KEEP_IT

def test_next(sway_cache):
    def ask():
        with sway_cache.lease(dummy("b")):
            note("b is had")
    in_a_thread(ask).join(20)
    END.set()
""".replace("KEEP_IT", keep),
        "--sway-cache-size=1",
    )
    result.assert_outcomes(passed=2)
    assert suite.events() == ["load a", "close a", "load b", "b is had", "close b"]


@pytest.mark.parametrize("scope", ["class", "module", "package", "session"])
@pytest.mark.parametrize("arguments", ["request, sway_cache", "request"])
def test_a_lease_that_a_wider_fixture_takes_ends_with_it(suite: Suite, scope: str, arguments: str) -> None:
    """Even in a thread of its own, and only after its own teardown."""
    source = """
import threading

KEEP = []

@pytest.fixture(scope=SCOPE)
def inner(sway_cache):
    KEEP.append(sway_cache.acquire(dummy("inner")))

@pytest.fixture(scope=SCOPE)
def backend(ARGUMENTS):
    sway_cache = request.getfixturevalue("sway_cache")
    request.getfixturevalue("inner")
    thread = threading.Thread(target=lambda: KEEP.append(sway_cache.acquire(dummy("wide"))))
    thread.start()
    thread.join(20)
    yield KEEP[-1].backend
    assert len(sway_cache.leased()) == 2
    note("teardown")

class TestIt:
    def test_one(self, backend, sway_backend):
        sway_backend(dummy("a"))
        assert not backend.closed

    def test_two(self, backend, sway_backend):
        sway_backend(dummy("b"))
        assert not backend.closed

def test_three(sway_cache):
    held = {cached.backend.spec.base for cached in sway_cache.leased()}
    assert held == (set() if SCOPE == "class" else {"inner", "wide"})
"""
    result = suite.run(source.replace("SCOPE", repr(scope)).replace("ARGUMENTS", arguments), "--sway-cache-size=3")
    result.assert_outcomes(passed=3)
    assert suite.events()[:5] == ["load inner", "load wide", "load a", "close a", "load b"]
    assert suite.events()[5:] == ["teardown", "close inner", "close wide", "close b"]


def test_a_lease_that_is_taken_in_a_test_ends_with_it_though_a_wider_fixture_keeps_it(suite: Suite) -> None:
    result = suite.run(
        """
from contextlib import ExitStack

@pytest.fixture(scope="module")
def lend(sway_cache):
    with ExitStack() as stack:
        yield lambda spec: stack.enter_context(sway_cache.lease(spec))

def test_one(lend):
    assert not lend(dummy("a")).closed

def test_two(lend):
    assert not lend(dummy("b")).closed
""",
        "--sway-cache-size=1",
    )
    result.assert_outcomes(passed=2)
    assert suite.events() == ["load a", "close a", "load b", "close b"]


def test_a_fixture_whose_set_up_fails_keeps_no_lease(suite: Suite) -> None:
    result = suite.run(
        """
KEEP = []

class TestIt:
    @pytest.fixture(scope="class")
    def broken(self, sway_cache):
        KEEP.append(sway_cache.acquire(dummy("a")))
        raise RuntimeError("broken")

    def test_one(self, broken):
        pass

def test_two(sway_backend):
    sway_backend(dummy("b"))
""",
        "--sway-cache-size=1",
    )
    result.assert_outcomes(errors=1, passed=1)


def test_a_function_scoped_fixture_has_its_leases_in_its_own_teardown(suite: Suite) -> None:
    result = suite.run(
        """
@pytest.fixture
def backend(sway_cache):
    lease = sway_cache.acquire(dummy("a"))
    yield lease.backend
    assert len(sway_cache.leased()) == 1

def test_one(backend):
    pass

def test_two(sway_cache):
    assert not sway_cache.leased()
""",
        "--sway-cache-size=1",
    )
    result.assert_outcomes(passed=2)
