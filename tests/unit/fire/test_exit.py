"""Processes end cleanly with open leases and running threads: no hang, no close in a child, no output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[3]

BEGIN = """
import os, sys, threading
from tests.unit.fakes import Call, InformedFakeBuild, Watched, spec
from pytest_sway.cache.backend_cache import BackendCache

class Build(InformedFakeBuild):
    def closing(self, backend):
        os.write(1, f"{os.getpid() == PARENT and 'parent' or 'child'} closed {backend.name};".encode())

PARENT = os.getpid()
build = Build()
cache = BackendCache(max_size=2, build=build, lease_timeout=1000)
watched = Watched(cache)

def loading(name):
    gate = build.load_gate(name)
    call = Call(lambda: cache.acquire(spec(name)))
    gate.wait()
    return call
"""


def _run(script: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BEGIN + dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


ENDS = {
    "the end of the script": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "os._exit": ("os._exit(4)", 4),
    "an error": ("sys.excepthook = lambda *_: None; raise ZeroDivisionError", 1),
}

STATES = {
    "a lease open": "lease = cache.acquire(spec('a+x'))",
    "a lease in a cycle": "lease = cache.acquire(spec('a')); cycle = [lease]; cycle.append(cycle); del lease, cycle",
    "a lease of a dead thread": "leases = [Call(lambda: cache.acquire(spec('a'))).result()]",
    "a view open": "lease = cache.lease(spec('a')); backend = lease.__enter__()",
    "a load under way": "call = loading('a')",
    "one who waits for a load": (
        "call = loading('a'); waiter = Call(lambda: cache.acquire(spec('a'))); watched.until_waiting(1)"
    ),
    "one who waits for room": (
        "leases = [cache.acquire(spec(name)) for name in 'ab'];"
        " waiter = Call(lambda: cache.acquire(spec('c'))); watched.until_waiting(1)"
    ),
    "a close under way": (
        "build.closing = lambda backend: threading.Event().wait(); cache.get_or_load(spec('a'));"
        " call = Call(cache.evict_all)"
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("state", STATES)
def test_a_process_ends_as_it_was_told_to(state: str, end: str) -> None:
    script, status = ENDS[end]
    assert _run(f"{STATES[state]}\n{script}") == (status, "", "")


def test_who_shuts_down_at_exit_closes_everything() -> None:
    script = """
    import atexit
    atexit.register(cache.shutdown)
    leases = [cache.acquire(spec("a+x")), cache.acquire(spec("b"))]
    sys.exit(3)
    """
    assert _run(script) == (3, "parent closed a+x;parent closed b;", "")


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")


@fork
@pytest.mark.parametrize("end", ["os._exit(5)", "sys.exit(5)"])
@pytest.mark.parametrize("state", [state for state in STATES if state != "a close under way"])
def test_a_child_that_ends_closes_nothing_of_its_parents(state: str, end: str) -> None:
    script = f"""
{STATES[state]}
pid = os.fork()
if pid == 0:
    cache.evict_all()
    cache.shutdown()
    {end}
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
os._exit(status)
"""
    assert _run(script) == (5, "", "")


@fork
def test_a_child_closes_what_it_loaded_itself_and_the_parent_what_was_its_own() -> None:
    script = """
    cache.get_or_load(spec("a+x"))
    pid = os.fork()
    if pid == 0:
        cache.get_or_load(spec("a+y"))
        cache.shutdown()
        os._exit(5)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    cache.shutdown()
    sys.exit(status)
    """
    assert _run(script) == (5, "child closed a+y;parent closed a+x;", "")


@fork
def test_a_process_of_multiprocessing_can_load() -> None:
    script = """
    import multiprocessing
    lease = cache.acquire(spec("a+x"))
    call = loading("b")

    def work():
        build.load_gates.clear()
        with cache.lease(spec("b")) as backend:
            assert backend.use() == "b"
        cache.shutdown()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(20)
    os._exit(process.exitcode)
    """
    assert _run(script) == (0, "child closed b;", "")
