"""A real Ctrl-C during a load, a close or a test: every backend is closed, and pytest reports the interrupt."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.plugin.conftest import Suite

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the test needs a named pipe to be told the moment")


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """Start child processes with default handlers, since a background shell ignores SIGINT and SIGHUP."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


BLOCKS = """
import threading

def block():
    with open("moment", "w") as pipe:
        pipe.write("now")
    threading.Event().wait(120)
"""

PLUGIN = """
import pytest
from blocks import block

@pytest.hookimpl(tryfirst=True)
def pytest_sway_build_backend(spec):
    from conftest import FakeBackend, note
    note(f"load {spec.base}")
    if spec.base == "blocks-in-load":
        block()
    backend = FakeBackend(spec)
    if spec.base == "blocks-in-close":
        def close():
            note(f"close {spec.base}")
            block()
        backend.close = close
    return backend
"""

TESTS = """
from blocks import block

def test_first(sway_backend):
    sway_backend(dummy("a"))

def test_second(sway_backend):
    {body}

def test_third(sway_backend):
    note("never reached")
"""


@pytest.mark.parametrize(
    ("body", "events"),
    [
        ('sway_backend(dummy("blocks-in-load"))', ["load a", "load blocks-in-load", "close a"]),
        (
            'sway_backend(dummy("blocks-in-close")); note("pinned")\n\ndef test_evicts(sway_backend):\n'
            '    sway_backend(dummy("b")); sway_backend(dummy("c"))',
            ["load a", "load blocks-in-close", "pinned", "close a", "load b", "close blocks-in-close", "close b"],
        ),
        ('sway_backend(dummy("b")); block()', ["load a", "load b", "close a", "close b"]),
    ],
    ids=["load", "close", "test"],
)
def test_everything_is_closed(suite: Suite, body: str, events: list[str]) -> None:
    output = interrupted(suite, TESTS.format(body=body), signal_group=False)
    assert suite.events() == events, output


@pytest.mark.parametrize(
    ("body", "loaded"),
    [('sway_backend(dummy("blocks-in-load"))', []), ('sway_backend(dummy("b")); block()', ["b"])],
    ids=["load", "test"],
)
@pytest.mark.parametrize("signal_group", [True, False], ids=["all processes", "the controller"])
def test_workers_close_everything_and_their_summary_is_printed(
    suite: Suite, body: str, loaded: list[str], signal_group: bool
) -> None:
    output = interrupted(suite, TESTS.format(body=body), "-n1", signal_group=signal_group)
    closed = [event for event in suite.events() if event.startswith("close")]
    assert closed == [f"close {base}" for base in ("a", *loaded)]
    assert "= sway =" in output
    assert f"gw0: {1 + len(loaded)} load" in output
    assert not list(suite.pytester.path.glob("pytest-sway-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("signal_group", [True, False], ids=["all processes", "the controller"])
def test_a_run_that_is_terminated_leaves_no_folder_of_shared_weights(
    suite: Suite, number: int, signal_group: bool
) -> None:
    tests = """
from blocks import block
from pytest_sway.run.controller import weights_folder

def test_it(pytestconfig):
    (weights_folder(pytestconfig) / "weights").write_bytes(bytes(1000))
    block()
"""
    interrupted(suite, tests, "-n2", signal_group=signal_group, number=number, code=-number)
    assert not list(suite.pytester.path.glob("pytest-sway-*"))


def interrupted(
    suite: Suite,
    tests: str,
    *args: str,
    signal_group: bool,
    number: int = signal.SIGINT,
    code: int = pytest.ExitCode.INTERRUPTED,
) -> str:
    """Run the tests in a subprocess, send a signal when they ask for it, and return the output."""
    suite.pytester.makepyfile(blocks=BLOCKS, plugin=PLUGIN)
    suite.write(tests)
    os.mkfifo("moment")
    pipe = os.open("moment", os.O_RDONLY | os.O_NONBLOCK)
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(suite.pytester.path)},
    )
    try:
        reached, _, _ = select.select([pipe], [], [], 60)
        assert reached, "the child never got there"
    finally:
        os.close(pipe)
    (os.killpg if signal_group else os.kill)(child.pid, number)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == code, output
    return output
