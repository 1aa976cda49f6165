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
def test_naming_specs_is_advised_if_workers_loaded_the_same_base(
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
    assert ("several workers loaded the same base; without --dist" in lines) == advises


def test_loads_that_let_workers_share_a_base_are_explained_instead() -> None:
    workers = [WorkerReport(name, SwayStats()) for name in ("gw0", "gw1")]
    total = SwayStats()
    for worker in workers:
        assert worker.stats is not None
        worker.stats.backend("one").loads += 1
        worker.stats.base_loaded("one", 1.0)
        total.merge(worker.stats)
    lines = [*summary_lines(total, workers, dist="load", shared_loads=1)]
    assert "1 load let workers share the tests of a base; one alone would have taken longer" in lines
    assert not any("several workers" in line for line in [*lines, *summary_lines(total, workers, shared_loads=0)])
