"""Backends that a test asks for in threads: they are the test's, and end with it."""

from __future__ import annotations

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
    with pytest.raises(CacheFullError, match="all of it is in use by the one who asks"):
        sway_backend(dummy("b"))

def test_thread_alive(sway_backend):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(sway_backend, dummy("a")).result()
        with pytest.raises(CacheFullError, match="all of it is in use by the one who asks"):
            sway_backend(dummy("b"))

def test_both_in_threads(sway_backend):
    async def both():
        await asyncio.to_thread(sway_backend, dummy("a"))
        await asyncio.to_thread(sway_backend, dummy("b"))
    with pytest.raises(CacheFullError, match="all of it is in use by the one who asks"):
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


def test_a_load_under_way_in_a_thread_when_its_test_ends_is_pinned_by_nobody(suite: Suite) -> None:
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

def test_leaves_a_thread(sway_backend):
    def work():
        try:
            sway_backend(dummy("slow"))
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
    assert "test_leaves_a_thread was called in a thread of that test, which ended while the backend" in str(ERRORS[0])
    LIVES_ON.set()
""",
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

KEEP = []

def test_forgets(sway_cache):
    with ThreadPoolExecutor(1) as pool:
        KEEP.append(pool.submit(sway_cache.acquire, dummy("a")).result())

def test_next(sway_backend):
    with pytest.raises(CacheFullError, match="did not release it: dummy:a .held by test_suite.py::test_forgets"):
        sway_backend(dummy("b"))
""",
        "--sway-cache-size=1",
    )
    result.assert_outcomes(passed=2)
