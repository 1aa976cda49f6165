"""The plugin's cost in a run that does not use it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from tests.benchmarks.figures import Figure, run

ROUNDS = 20
COLLECT = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_empty.py").write_text("def test_nothing(): pass\n")
        with_plugin, without = [], []
        for _ in range(ROUNDS):
            with_plugin.append(run(COLLECT, folder).seconds)
            without.append(run([*COLLECT, "-p", "no:pytest-sway"], folder).seconds)
    ratio = median(with_plugin) / median(without)
    yield Figure(
        "collecting, plugin unused / without the plugin",
        1.03,
        ratio,
        f"medians of {ROUNDS}: {median(with_plugin):.3f} s, {median(without):.3f} s",
    )
