"""Simulated runs of large suites: the tables of docs/pages/explanation/order.md and docs/pages/explanation/scale.md.

``python -m tests.benchmarks.scale`` writes them to the pages, and a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.simulator import Costs, Outcome, Work, by_hand, collected, simulate

PAGES: Final = Path(__file__).parents[2] / "docs" / "pages" / "explanation"

# --- order.md: any models ---------------------------------------------------------------------------------------------

TEST, LOAD = 0.5, 4.0
SUITES: Final = {
    "four bases with 48 tests each": [(base, 48, TEST) for base in "abcd"],
    "six bases, one with tests 5 times as long": [("a", 48, 5 * TEST), *((base, 48, TEST) for base in "bcdef")],
    "six bases, one with 5 times as many tests": [("a", 240, TEST), *((base, 48, TEST) for base in "bcdef")],
}


def dealing_table() -> str:
    """Return the table that compares the ways to deal tests."""
    costs = Costs(load=LOAD, reply=0.002)
    rows = []
    for name, bases in SUITES.items():
        tests = collected([Work((base,), seconds) for base, size, seconds in bases for _ in range(size)])
        for workers in (2, 4, 8):
            runs = [simulate(dist, tests, workers, costs) for dist in ("load", "worksteal", "loadgroup")]
            runs.append(simulate("loadgroup", tests, workers, costs, groups=by_hand(tests, workers, costs)))
            first = simulate("sway", tests, workers, costs)
            again = simulate("sway", tests, workers, costs, remembered=first.remembered)
            cells = (f"{run.wall:.0f} s, {run.loads}" for run in (*runs, first, again))
            rows.append((name, str(workers), *cells))
    titles = ("suite", "workers", "`load`", "`worksteal`", "`loadgroup`", "by hand", "first run", "second run")
    return _table(titles, rows)


# --- scale.md: 8B on GPUs ---------------------------------------------------------------------------------------------

BASES, ADAPTERS, TESTS = 3, 20, 1000
QUESTIONS = 5
QUESTION = 0.023 * 8 / 1.2
"""Seconds of a question to a model of 8B: as measured for 1.2B, times the weights."""
BLOCK = 20
"""Tests that are simulated as one."""
GPU: Final = Costs(load=8.0 + 0.096 * 8 / 1.2, adapter=0.1, start=15.0, reply=0.002)


def gpu_suite(slow: float = 1.0) -> list[Work]:
    """Return the suite, in which the tests of the first base take ``slow`` times as long."""
    seconds = BLOCK * QUESTIONS * QUESTION
    return [
        Work((f"base{base}",), seconds * (slow if base == 0 else 1.0), f"{base}/{adapter}")
        for base in range(BASES)
        for adapter in range(ADAPTERS)
        for _ in range(TESTS // BLOCK)
    ]


def scale_table() -> str:
    """Return the table of what the suite costs on some GPUs."""
    rows: list[Sequence[str]] = []
    for name, tests in (("all tests equal", gpu_suite()), ("one base 5 times as long", gpu_suite(5.0))):
        for gpus in (1, 4, 8):
            runs = [("pytest-sway" if gpus > 1 else "one process", simulate("sway", tests, gpus, GPU))]
            if gpus > 1:
                runs += [(f"`{dist}`", simulate(dist, tests, gpus, GPU)) for dist in ("load", "loadgroup")]
            rows += [(name, str(gpus), dist, *_cells(run, gpus)) for dist, run in runs]
    titles = (
        "suite",
        "GPUs",
        "dealt by",
        "wall",
        "GPU hours",
        "base loads",
        "adapter loads",
        "of the GPU hours, loads",
    )
    return _table(titles, rows)


def _cells(run: Outcome, gpus: int) -> Iterator[str]:
    loading = GPU.load * run.loads + GPU.adapter * run.adapter_loads
    yield f"{run.wall / 3600:.2f} h"
    yield f"{gpus * run.wall / 3600:.1f}"
    yield str(run.loads)
    yield str(run.adapter_loads)
    yield f"{100 * loading / (gpus * run.wall):.1f} %"


def without_cache_hours() -> float:
    """Return the GPU hours if each test loads its own base and adapter."""
    each = GPU.load + GPU.adapter + QUESTIONS * QUESTION
    return BASES * ADAPTERS * TESTS * each / 3600


# --- the pages --------------------------------------------------------------------------------------------------------


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def pages() -> Iterator[tuple[Path, str]]:
    """Yield each page with its current table."""
    for name, table in (("order.md", dealing_table()), ("scale.md", scale_table())):
        path = PAGES / name
        text = path.read_text("utf-8")
        yield path, re.sub(r"(<!-- simulated -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)


if __name__ == "__main__":
    for page, current in pages():
        page.write_text(current, "utf-8")
    print(f"{without_cache_hours():.0f} GPU hours if each test loads its own")
