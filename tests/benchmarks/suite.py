"""A suite of 36 tests over six adapters in the worst order, compared with the same suite that loads in each test."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, Run, ratio, run
from tests.benchmarks.plain import DIFFER, LIBRARIES, LOAD
from tests.tiny import make_adapter

ROUNDS = 3

COMMON = (
    LIBRARIES
    + """
import time

BASE = {base!r}
ADAPTERS = {adapters!r}
PROMPT, ANSWER = "The capital of France is", " Paris"
"""
)

FRESH = (
    COMMON
    + LOAD
    + DIFFER
    + """
@pytest.mark.parametrize("n", range(36))
def test_adapter(n):
    started = time.perf_counter()
    tokenizer, model = load(BASE, ADAPTERS[n % 6])
    print("LOADED", time.perf_counter() - started)
    assert differ(tokenizer, model)
"""
)

SWAY = (
    COMMON
    + """
@pytest.mark.parametrize("n", range(36))
def test_adapter(sway_backend, n):
    backend = sway_backend({{"base": BASE, "adapter": ADAPTERS[n % 6]}})
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of(PROMPT, ANSWER) != base.logprob_of(PROMPT, ANSWER)
"""
)

LOADED = """
def pytest_sway_backend_loaded(cached):
    print("LOADED", cached.load_seconds)
"""

ONE_BASE_TWO_ADAPTERS = (
    COMMON
    + LOAD
    + DIFFER
    + """
def test_both():
    tokenizer, model = load(BASE, ADAPTERS[0])
    model.load_adapter(ADAPTERS[1], "second")
    for name in ("default", "second"):
        model.set_adapter(name)
        assert differ(tokenizer, model)
"""
)


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = smollm2_folder()
        adapters = [str(make_adapter(folder / f"adapter{n}", base, seed=n, r=8)) for n in range(6)]
        suites = {
            suite: _suite(folder / suite, source.format(base=str(base), adapters=adapters))
            for suite, source in (("fresh", FRESH), ("sway", SWAY), ("reference", ONE_BASE_TWO_ADAPTERS))
        }
        (suites["sway"] / "conftest.py").write_text(LOADED)
        runs: dict[str, list[Run]] = {suite: [] for suite in suites}
        for _ in range(ROUNDS):
            for suite, place in suites.items():
                runs[suite].append(run(["-m", "pytest", "-q", "-s", "--sway-cache-size=2"], place))
    fresh, sway, reference = runs["fresh"], runs["sway"], runs["reference"]
    base_loads = [
        int(match[1]) for r in sway if (match := re.search(r"^base .*: (\d+) loads?,", r.output, re.MULTILINE))
    ]
    assert len(base_loads) == ROUNDS
    yield Figure("36 tests, six adapters, cache of 2: base loads", 1, max(base_loads))
    yield ratio("36 tests: seconds spent loading / fresh in each test", 0.30, _loading(sway), _loading(fresh))
    wall = [r.seconds for r in sway], [r.seconds for r in fresh]
    yield ratio("36 tests: wall time / fresh in each test", 0.65, *wall)
    peak = [r.peak_bytes / 2**20 for r in sway], [r.peak_bytes / 2**20 for r in reference]
    yield ratio("36 tests: peak memory / one base with two adapters", 1.25, *peak, "MiB")


def _suite(folder: Path, source: str) -> Path:
    folder.mkdir()
    (folder / "test_suite.py").write_text(source)
    return folder


def _loading(runs: list[Run]) -> list[float]:
    return [sum(float(seconds) for seconds in re.findall(r"LOADED (\S+)", r.output)) for r in runs]
