"""A real Ctrl-C while a load, a close or a test runs: everything is closed, and pytest says that it was interrupted."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from tests.plugin.conftest import Suite

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the test needs a named pipe to be told the moment")

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
    suite.pytester.makepyfile(blocks=BLOCKS, plugin=PLUGIN)
    suite.write(TESTS.format(body=body))
    os.mkfifo("moment")
    pipe = os.open("moment", os.O_RDONLY | os.O_NONBLOCK)
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        reached, _, _ = select.select([pipe], [], [], 60)
        assert reached, "the child never got there"
    finally:
        os.close(pipe)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == pytest.ExitCode.INTERRUPTED, output
    assert suite.events() == events
