"""A compute-bound suite in two workers: pytest-sway's number of threads compared with the best fixed number."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, run

ROUNDS = 5

SUITE = """
import pytest
from pytest_sway import ModelSpec

@pytest.mark.parametrize("n", range(16))
@pytest.mark.parametrize("spec", [ModelSpec(base={base!r})])
def test_text(sway_backend, spec, n):
    with sway_backend(spec).as_base() as base:
        assert base.rolling_logprob(f"{{n}} bottles of beer on the wall, " * 50).total_logprob < 0
"""


def figures() -> Iterator[Figure]:
    cores = len(os.sched_getaffinity(0))
    by_hand = sorted({1, *(2**power for power in range(cores.bit_length()) if 2**power <= cores), cores})
    taken: dict[int | None, list[float]] = {threads: [] for threads in (None, *by_hand)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_suite.py").write_text(SUITE.format(base=str(smollm2_folder())))
        settings = list(taken.items())
        for turn in range(ROUNDS):
            for threads, seconds in settings[turn:] + settings[:turn]:  # rotated, so that none is always first
                variables = {"OMP_NUM_THREADS": None if threads is None else str(threads), "MKL_NUM_THREADS": None}
                command = ["-m", "pytest", "-q", "-n2", "--dist=loadgroup"]
                seconds.append(run(command, folder, variables).seconds)
    default = taken.pop(None)
    best = min(taken, key=lambda threads: median(taken[threads]))
    yield Figure(
        "a CPU-bound suite in two workers: wall / best OMP_NUM_THREADS",
        1.05,
        median(ours / theirs for ours, theirs in zip(default, taken[best], strict=True)),
        f"median of the ratios of {ROUNDS} turns; medians: {median(default):.2f} s; "
        + ", ".join(f"{median(seconds):.2f} s with {threads}" for threads, seconds in taken.items()),
    )
