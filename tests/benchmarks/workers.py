"""A suite of 48 tests over four bases and twelve adapters in the worst order, in two workers of pytest-xdist.

It is compared with a plain session-scoped fixture for each adapter, and with one process.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, ratio, run
from tests.benchmarks.plain import DIFFER, LIBRARIES, LOAD
from tests.tiny import make_adapter

ROUNDS = 3
BASES, ADAPTERS, TESTS = 4, 12, 48

COMMON = (
    LIBRARIES
    + """
import time
from pathlib import Path

BASES = {bases!r}
ADAPTERS = {adapters!r}
PROMPT, ANSWER = "The capital of France is", " Paris"

def loaded(seconds):
    with open(Path(__file__).with_name("loads.txt"), "a") as file:
        file.write(f"{{seconds}}\\n")
"""
)

PLAIN = (
    COMMON
    + LOAD
    + DIFFER
    + """
def make_fixture(n):
    @pytest.fixture(scope="session", name=f"adapter{{n}}")
    def adapter():
        started = time.perf_counter()
        made = load(BASES[n % 4], ADAPTERS[n])
        loaded(time.perf_counter() - started)
        return made
    return adapter

for n in range(12):
    globals()[f"fixture{{n}}"] = make_fixture(n)

@pytest.mark.parametrize("n", range(48))
def test_adapter(n, request):
    assert differ(*request.getfixturevalue(f"adapter{{n % 12}}"))
"""
)

SWAY = (
    COMMON
    + """
from pytest_sway import ModelSpec

@pytest.mark.parametrize("spec", [ModelSpec(base=BASES[n % 4], adapter=ADAPTERS[n % 12]) for n in range(48)])
def test_adapter(sway_backend, spec):
    backend = sway_backend(spec)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of(PROMPT, ANSWER) != base.logprob_of(PROMPT, ANSWER)
"""
)

HOOK = """
def pytest_sway_backend_loaded(cached):
    from test_suite import loaded
    loaded(cached.load_seconds)
"""


@dataclass(frozen=True)
class Suite:
    """One way to run the 48 tests, and its measurements."""

    folder: Path
    options: tuple[str, ...]
    wall: list[float]
    loading: list[float]
    base_loads: list[int]

    def run(self) -> None:
        result = run(["-m", "pytest", "-q", *self.options], self.folder)
        assert f"{TESTS} passed" in result.output, result.output
        loads = self.folder / "loads.txt"
        self.wall.append(result.seconds)
        self.loading.append(sum(map(float, loads.read_text().split())))
        self.base_loads.append(sum(map(int, re.findall(r"^base .*: (\d+) loads?,", result.output, re.MULTILINE))))
        loads.unlink()


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        bases = [_copy(smollm2_folder(), root / f"base{n}") for n in range(BASES)]
        adapters = [make_adapter(root / f"adapter{n}", bases[n % BASES], seed=n, r=8) for n in range(ADAPTERS)]
        values = {"bases": [str(base) for base in bases], "adapters": [str(adapter) for adapter in adapters]}
        plain = _suite(root / "plain", PLAIN.format(**values), "", "-n2")
        ours = _suite(root / "ours", SWAY.format(**values), HOOK, "-n2", "--dist=loadgroup")
        alone = _suite(root / "alone", SWAY.format(**values), HOOK, "-n0")
        for _ in range(ROUNDS):
            for suite in (plain, ours, alone):
                suite.run()
    title = f"{TESTS} tests in two workers"
    yield Figure(f"{title}: loads of {BASES} bases", BASES + 1, max(ours.base_loads))
    yield ratio(f"{title}: loading / session fixtures", 0.25, ours.loading, plain.loading)
    yield ratio(f"{title}: wall / session fixtures", 1.0, ours.wall, plain.wall)
    yield ratio(f"{title}: wall / -n 0", 1.1, ours.wall, alone.wall)


def _copy(source: Path, target: Path) -> Path:
    """Copy a model to a folder of its own, with hard links if possible."""

    def link(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)

    return Path(shutil.copytree(source, target, copy_function=link))


def _suite(folder: Path, source: str, conftest: str, *options: str) -> Suite:
    folder.mkdir()
    (folder / "test_suite.py").write_text(source)
    (folder / "conftest.py").write_text(conftest)
    return Suite(folder, options, [], [], [])
