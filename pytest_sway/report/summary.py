"""The summary at the end of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_sway.system.redaction import redacted
from pytest_sway.system.wording import format_bytes

if TYPE_CHECKING:
    import pytest

    from pytest_sway.cache.stats import BackendStats, SwayStats, WorkerReport

_WORTH_A_LINE = 0.05
_COLUMNS = ("backend", "loads", "hits", "seconds", "evicted", "failed")


def write_summary(
    terminal: pytest.TerminalReporter,
    stats: SwayStats,
    workers: Sequence[WorkerReport] = (),
    *,
    shared_loads: int | None = None,
    fails: bool,
) -> None:
    """Write the section ``sway``, if a test asked for a backend.

    Args:
        terminal: The reporter to write to.
        stats: The counts, summed over all workers.
        workers: The report of each worker.
        shared_loads: How many loads let workers share a base's tests, if pytest-sway has dealt them.
        fails: Whether leaks fail the run.
    """
    dist = terminal.config.getoption("dist", "no")
    lines = list(summary_lines(stats, workers, dist=dist, shared_loads=shared_loads))
    if lines:
        terminal.write_sep("=", "sway")
        for line in lines:
            terminal.write_line(redacted(line))
    if fails:
        terminal.write_line("the run fails because weights leaked (sway_on_leak = error)", red=True)


def summary_lines(
    stats: SwayStats, workers: Sequence[WorkerReport] = (), *, dist: str = "no", shared_loads: int | None = None
) -> Iterator[str]:
    """Yield the lines of the summary; none if no test asked for a backend.

    Args:
        stats: The counts, summed over all workers.
        workers: The report of each worker.
        dist: The value of pytest-xdist's ``--dist``.
        shared_loads: How many loads let workers share a base's tests, if pytest-sway has dealt them.
    """
    if stats.backends:
        yield from _table(stats)
    elif not any(worker.loading for worker in workers):
        return
    for name, base in stats.bases.items():
        line = f"base {name}: {_times(base.loads, 'load')}, {base.load_seconds:.2f} s"
        if (recalled := stats.recalled.get(name)) is not None:
            line += f"; {_times(recalled.answers, 'answer')} from memory saved {recalled.seconds:.1f} s"
        yield line
    yield from (f"fetched from the hub: {text}" for text in stats.fetched)
    if stats.import_seconds >= _WORTH_A_LINE:
        each = ", over all workers" if workers else ""
        yield f"imports of libraries: {stats.import_seconds:.1f} s, once in each process{each}"
    saved = f"saved about {stats.saved_seconds():.1f} s of loading"
    yield f"{saved}, over all workers" if workers else f"{_peak(stats)}; {saved}"
    loaders = Counter(name for worker in workers if worker.stats is not None for name in worker.stats.bases)
    if shared_loads:
        yield f"{_times(shared_loads, 'load')} let workers share the tests of a base; one alone would have taken longer"
    elif shared_loads is None and dist not in ("loadgroup", "each") and max(loaders.values(), default=0) > 1:
        yield (
            "several workers loaded the same base; without --dist, the tests of a base stay together, if a marker or a"
            " parameter names their specs"
        )
    for worker in workers:
        yield from _worker_line(worker)
    for title, found in (
        ("left changed", stats.mutations),
        ("leaked", stats.leaks),
        ("failed to close", stats.close_errors),
        ("raised", stats.hook_errors),
    ):
        for text in found:
            yield f"{title}: {text}"


def _table(stats: SwayStats) -> Iterator[str]:
    rows = [_COLUMNS, *(_row(label, backend) for label, backend in stats.backends.items())]
    if len(stats.backends) > 1:
        rows.append(_row("total", stats.total()))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for label, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        yield "  ".join([label.ljust(widths[0]), *cells])


def _row(label: str, stats: BackendStats) -> tuple[str, ...]:
    numbers = (stats.loads, stats.hits, f"{stats.load_seconds:.2f}", stats.evictions, stats.failures)
    return (label, *(str(number) for number in numbers))


def _worker_line(worker: WorkerReport) -> Iterator[str]:
    if worker.error is not None:
        loading = f" while it loaded {', '.join(worker.loading)}" if worker.loading else ""
        yield f"{worker.name}: {worker.error}{loading}; its counts are missing"
    elif worker.stats is not None:
        total = worker.stats.total()
        counts = f"{_times(total.loads, 'load')}, {_times(total.hits, 'hit')}, {total.load_seconds:.2f} s"
        yield f"{worker.name}: {counts}; {_peak(worker.stats)}"


def _peak(stats: SwayStats) -> str:
    peak = f"peak: {_times(stats.peak_resident, 'backend')}"
    return f"{peak}, {format_bytes(stats.peak_bytes)} of weights" if stats.peak_bytes else peak


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
