"""The summary's lines, from plain values."""

from __future__ import annotations

import pytest

from pytest_sway.cache.stats import SwayStats, WorkerReport
from pytest_sway.report.summary import summary_lines


@pytest.mark.parametrize(
    ("dist", "bases", "advises"),
    [
        ("loadfile", ("one", "one"), True),
        ("load", ("one", "one"), True),
        ("load", ("one", "two"), False),
        ("loadgroup", ("one", "one"), False),
        ("each", ("one", "one"), False),
    ],
)
def test_loadgroup_is_advised_if_workers_loaded_the_same_base_without_it(
    dist: str, bases: tuple[str, ...], advises: bool
) -> None:
    workers = [WorkerReport(f"gw{number}", SwayStats()) for number in range(len(bases))]
    total = SwayStats()
    for worker, base in zip(workers, bases, strict=True):
        assert worker.stats is not None
        worker.stats.backend(base).loads += 1
        worker.stats.base_loaded(base, 1.0)
        total.merge(worker.stats)
    lines = "\n".join(summary_lines(total, workers, dist=dist))
    assert ("several workers loaded the same base; --dist loadgroup" in lines) == advises
