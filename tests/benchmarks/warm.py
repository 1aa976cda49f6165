"""A warm request, measured by pytest-benchmark inside a test that uses the fixture."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, run
from tests.tiny import make_adapter

TEST = """
def test_warm(sway_backend, benchmark):
    spec = {{"base": {base!r}, "adapter": {adapter!r}}}
    sway_backend(spec)
    benchmark(sway_backend, spec)
"""


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = smollm2_folder()
        adapter = make_adapter(folder / "adapter", base, seed=1, r=8)
        (folder / "test_warm.py").write_text(TEST.format(base=str(base), adapter=str(adapter)))
        run(["-m", "pytest", "-q", "-p", "no:xdist", "--benchmark-json=warm.json"], folder)
        stats = json.loads((folder / "warm.json").read_text())["benchmarks"][0]["stats"]
    yield Figure(
        "a warm sway_backend(spec), microseconds",
        20.0,
        stats["median"] * 1e6,
        f"median of {stats['rounds']} rounds; mean {stats['mean'] * 1e6:.1f}",
    )
