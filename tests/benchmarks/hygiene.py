"""The cost of comparing a backend with its snapshot after each test."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from examples.smollm2 import smollm2_folder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.run.serving.hygiene import changes
from tests.benchmarks.figures import Figure
from tests.tiny import make_adapter

ROUNDS = 200
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def figures() -> Iterator[Figure]:
    for count, targets in ((1, ("q_proj", "v_proj")), (1, ALL_LINEAR), (2, ALL_LINEAR)):
        with tempfile.TemporaryDirectory() as name:
            base = smollm2_folder()
            cache = BackendCache(max_size=count)
            backends = []
            for n in range(count):
                adapter = make_adapter(Path(name) / f"adapter{n}", base, seed=n, r=8, targets=targets)
                backends.append(cache.get_or_load({"base": base, "adapter": adapter}).backend)
            with backends[0].as_finetuned() as view:
                view.logprob_of("The capital of France is", " Paris")
            took = []
            for _ in range(ROUNDS):
                started = time.perf_counter()
                found = changes(backends[0])
                took.append(time.perf_counter() - started)
                assert not found
            cache.shutdown()
        yield Figure(
            f"comparing a backend after a test, {count} x {len(targets)} targets, ms",
            5.0,
            median(took) * 1e3,
            f"median of {ROUNDS}; 95th percentile {sorted(took)[int(0.95 * ROUNDS)] * 1e3:.1f}",
        )
