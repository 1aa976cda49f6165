"""The summary, the durations, and the display of slow loads."""

from __future__ import annotations

import io
import os
import re
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_sway.cache import backend_cache
from pytest_sway.cache.stats import BackendStats, SwayStats
from pytest_sway.report.progress import LoadProgress, noted_loads
from pytest_sway.report.summary import summary_lines
from tests.plugin.conftest import Suite


def test_nothing_is_printed_when_no_test_used_a_backend(any_suite: Suite) -> None:
    result = any_suite.run("""
def test_x(): pass
def test_y(sway_backend): pass
""")
    assert "= sway =" not in result.stdout.str()


def test_the_summary_counts_loads_hits_and_evictions(suite: Suite) -> None:
    result = suite.run(
        """
@pytest.mark.parametrize("name", ["a", "b", "b"])
def test_x(sway_backend, name):
    sway_backend(dummy(name))
""",
        "--sway-cache-size=1",
    )
    result.stdout.re_match_lines([r"=+ sway =+", r"backend  loads  hits  seconds"], consecutive=True)
    result.stdout.re_match_lines_random(
        [
            r"backend  loads  hits  seconds  evicted  failed",
            r"dummy:a      1     0     \d\.\d\d        1       0",
            r"dummy:b      1     1     \d\.\d\d        0       0",
            r"total        2     1     \d\.\d\d        1       0",
            r"peak: 1 backend; saved about \d\.\d s of loading",
        ]
    )


def test_imports_have_a_line_of_their_own_and_are_charged_to_no_test(any_suite: Suite) -> None:
    result = any_suite.run(
        """
from pytest_sway.system import imports

def test_x(sway_backend):
    imports._seconds.append(1000.0)
    sway_backend(dummy("a"))

def test_y(sway_backend):
    sway_backend(dummy("a"))
""",
        "--durations=0",
        "-vv",
    )
    shown = result.stdout.str()
    assert re.search(r"^imports of libraries: 1000\.0 s, once in each process", shown, re.MULTILINE)
    assert "saved about 0.0 s of loading" in shown
    assert not re.search(r"^\d{3,}\.\d+s call", shown, re.MULTILINE)


def test_a_shared_base_and_its_bytes_are_shown() -> None:
    stats = SwayStats(peak_resident=2, peak_bytes=3 * 2**29)
    stats.backend("base + one").add(BackendStats(loads=1, load_seconds=3.0, hits=1, base="base"))
    stats.backend("base + two").add(BackendStats(loads=1, load_seconds=1.0, base="base"))
    stats.base_loaded("base", 2.0)
    text = "\n".join(summary_lines(stats))
    assert "base base: 1 load, 2.00 s" in text
    # one hit saves 1 s of adapter and 2 s of base, and one load shares its base
    assert "peak: 2 backends, 1.5 GiB of weights; saved about 5.0 s of loading" in text


def test_load_seconds_are_not_charged_to_the_test_that_came_first(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count(0, 1000)
    monkeypatch.setattr(
        backend_cache, "time", SimpleNamespace(perf_counter=lambda: next(clock), monotonic=time.monotonic)
    )
    result = suite.run(
        'def test_x(sway_backend): sway_backend(dummy("a"))', "--durations=0", "-vv", "--junitxml=report.xml"
    )
    result.stdout.fnmatch_lines(["dummy:a * 1000.00 *", "0.00s call*test_suite.py::test_x"])
    assert '<property name="sway_load_seconds" value="1000' in Path("report.xml").read_text()


class _Terminal(io.StringIO):
    """A terminal that sets an event when something is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def flush(self) -> None:
        self.written.set()


def test_a_load_that_takes_long_is_shown_with_its_seconds() -> None:
    terminal = _Terminal()
    with LoadProgress(terminal, patience=0.0).loading("base + adapter"):
        assert terminal.written.wait(30)
    assert re.fullmatch(r"\nsway: loading base \+ adapter \.\.\. \d+\.\d s\n", terminal.getvalue())


def test_a_quick_load_is_not_shown() -> None:
    terminal = _Terminal()
    with LoadProgress(terminal, patience=600.0).loading("base + adapter"):
        pass
    assert terminal.getvalue() == ""


def test_of_several_processes_each_says_what_it_loads_in_whole_lines() -> None:
    terminal = _Terminal()
    with LoadProgress(terminal, worker="gw1", patience=0.0).loading("base"):
        assert terminal.written.wait(30)
    text = r"\n\[gw1\] sway: loading base \.\.\.\n\n\[gw1\] sway: loaded base in \d+\.\d s\n"
    assert re.fullmatch(text, terminal.getvalue())


def test_a_note_holds_what_is_being_loaded_for_as_long_as_it_is(tmp_path: Path) -> None:
    note = tmp_path / "note"
    progress = LoadProgress(None, note=note)
    assert noted_loads(note) == ()
    with progress.loading("base + one"):
        with progress.loading("base + two"):
            assert noted_loads(note) == ("base + one", "base + two")
        assert noted_loads(note) == ("base + one",)
    assert noted_loads(note) == ()


def test_a_note_that_cannot_be_written_fails_no_load(tmp_path: Path) -> None:
    note = tmp_path / "gone" / "note"
    with LoadProgress(None, note=note).loading("base"):
        assert noted_loads(note) == ()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="the test needs a terminal")
@pytest.mark.parametrize("args", [(), ("-n1",)], ids=["alone", "in a worker"])
def test_a_long_load_is_shown_on_a_real_terminal_past_the_capture(suite: Suite, args: tuple[str, ...]) -> None:
    suite.write("""
def test_x(sway_backend):
    sway_backend(dummy("waits"))
""")
    os.mkfifo("go")
    shown, terminal = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    text, told = b"", False
    with suppress(OSError):  # on Linux, reading a closed terminal raises it
        while select.select([shown], [], [], 60)[0] and (chunk := os.read(shown, 4096)):
            text += chunk
            if b"sway: loading dummy:waits" in text and not told:
                Path("go").write_text("go")
                told = True
    os.close(shown)
    assert told, text.decode()
    assert child.wait(60) == 0, text.decode()
