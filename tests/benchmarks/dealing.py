"""Suites of which one base takes 5 times as long, in two workers of pytest-xdist: ``-n 2`` against every ``--dist``.

Loads and tests sleep for a known time. So the measured times, from the first load to the last test, are those of the
schedulers, and two cores suffice. `tests.benchmarks.scale` simulates more workers.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.benchmarks.figures import Figure, run

ROUNDS = 3
LOAD = 0.8
BASES = "abcdef"
SIZE = 24

CONFTEST = """
import os
import time
from pathlib import Path

import pytest

LOG = Path(__file__).with_name("log.txt")


def note(event, started):
    with LOG.open("a") as file:
        file.write(f"{event} {started} {time.monotonic()}\\n")


class Backend:
    def as_base(self): ...
    def as_finetuned(self): ...


def pytest_sway_build_backend(spec):
    started = time.monotonic()
    time.sleep({load})
    note("load", started)
    return Backend()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    started = time.monotonic()
    try:
        return (yield)
    finally:
        note("test", started)
"""

TESTS = """
import time

import pytest

SECONDS = {seconds!r}
GROUPS = {groups!r}


def marks(base, n):
    yield pytest.mark.sway_spec({{"kind": "dummy", "base": base}})
    if GROUPS:
        yield pytest.mark.xdist_group(GROUPS[base] if isinstance(GROUPS[base], str) else GROUPS[base][n])


CASES = [
    pytest.param(base, n, marks=[*marks(base, n)]) for n in range({size}) for base in SECONDS
]


@pytest.mark.parametrize(("base", "n"), CASES)
def test_x(sway_backend, base, n):
    sway_backend()
    time.sleep(SECONDS[base])
"""


@dataclass
class Way:
    """One way to deal the tests, and its measurements."""

    name: str
    folder: Path
    options: tuple[str, ...]
    keeps_cache: bool = False
    walls: list[float] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)

    def run(self) -> None:
        if not self.keeps_cache:
            (self.folder / ".pytest_cache/v/sway/durations").unlink(missing_ok=True)
        result = run(["-m", "pytest", "-q", *self.options], self.folder)
        assert f"{SIZE * len(BASES)} passed" in result.output, result.output
        log = self.folder / "log.txt"
        events = [line.split() for line in log.read_text().splitlines()]
        log.unlink()
        self.walls.append(max(float(end) for *_, end in events) - min(float(start) for _, start, _ in events))
        self.loads.append(sum(kind == "load" for kind, *_ in events))
        found = re.search(r"^(\d+) loads? let workers share", result.output, re.MULTILINE)
        self.shared.append(int(found[1]) if found else 0)

    @property
    def wall(self) -> float:
        return median(self.walls)

    @property
    def detail(self) -> str:
        return f"{self.name} {self.wall:.2f} s, {max(self.loads)} loads"


def figures() -> Iterator[Figure]:
    equal = dict.fromkeys(BASES, 0.1)
    halves: dict[str, object] = {base: "first" if base in "abc" else "second" for base in BASES}
    shared = [*["first"] * (SIZE // 2), *["second"] * (SIZE // 2)]
    uneven: dict[str, object] = {"a": "first", "b": shared, **dict.fromkeys("cdef", "second")}
    yield from _compared("equal bases", equal, halves)
    yield from _compared("one base 5 times as long", {**equal, "a": 0.5}, uneven)


def _compared(title: str, seconds: Mapping[str, float], groups: Mapping[str, object]) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        hand = _way("by hand", root / "hand", seconds, groups, "--dist=loadgroup")
        load = _way("load", root / "load", seconds, {}, "--dist=load")
        steal = _way("worksteal", root / "steal", seconds, {}, "--dist=worksteal")
        group = _way("loadgroup", root / "group", seconds, {}, "--dist=loadgroup")
        first = _way("first run", root / "first", seconds, {})
        again = _way("second run", root / "again", seconds, {}, keeps_cache=True)
        again.run()  # whose durations the next runs know
        again.walls.clear()
        for _ in range(ROUNDS):
            for way in (hand, load, steal, group, first, again):
                way.run()
    detail = "; ".join(way.detail for way in (hand, load, steal, group, first, again))
    for way in (first, again):
        yield Figure(f"{title}, {way.name}: wall / best by hand", 1.05, way.wall / hand.wall, detail)
        pairs = zip(way.loads, way.shared, strict=True)
        beyond = max(loads - shared for loads, shared in pairs)
        yield Figure(f"{title}, {way.name}: loads but those for sharing", max(group.loads), beyond)


def _way(
    name: str,
    folder: Path,
    seconds: Mapping[str, float],
    groups: Mapping[str, object],
    *options: str,
    keeps_cache: bool = False,
) -> Way:
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST.replace("{load}", str(LOAD)))
    (folder / "test_suite.py").write_text(TESTS.format(seconds=dict(seconds), groups=dict(groups), size=SIZE))
    return Way(name, folder, ("-n2", *options), keeps_cache)
