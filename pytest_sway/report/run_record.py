"""The run record: a run as plain values, from which all report files are made.

Its schema is `docs/pages/reference/run-record.schema.json`. Change `SCHEMA` if you change an existing key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.cache.stats import SwayStats
from pytest_sway.report.comparisons import finite
from pytest_sway.system.redaction import redacted_values

if TYPE_CHECKING:
    from pytest_sway.cache.stats import Event, WorkerReport

SCHEMA: Final = 1
_DEEPEST: Final = 30


class Run(NamedTuple):
    """The run itself.

    Attributes:
        started: The start, in seconds of `time.time`.
        seconds: The duration.
        exit_status: pytest's exit status.
        arguments: pytest's command-line arguments.
    """

    started: float
    seconds: float
    exit_status: int
    arguments: Sequence[str]


def run_record(
    run: Run,
    comparisons: Sequence[Mapping[str, Any]],
    workers: Sequence[WorkerReport],
    *,
    distributed: bool,
    named: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Return the record of a run, without secrets.

    Args:
        run: The run itself.
        comparisons: The comparisons from `pytest_sway.report.comparisons`.
        workers: The report of each process that ran tests.
        distributed: Whether these processes are pytest-xdist's workers.
        named: The configured specs.
        versions: The versions of the libraries that this process imported.
    """
    total = SwayStats()
    for worker in workers:
        if worker.stats is not None:
            total.merge(worker.stats, origin=worker.name if distributed else None)
    started = datetime.fromtimestamp(run.started, UTC)
    record = {
        "schema": SCHEMA,
        "run": {
            "started": started.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "seconds": round(run.seconds, 3),
            "exit_status": run.exit_status,
            "arguments": list(run.arguments),
            "workers": len(workers) if distributed else 0,
        },
        "versions": {**total.versions, **versions},
        "devices": total.devices,
        "specs": {**{name: {"fields": fields, "digest": None} for name, fields in named.items()}, **total.specs},
        "comparisons": list(comparisons),
        "workers": {worker.name: _worker(worker, run) for worker in workers},
        "leaks": total.leaks,
        "mutations": total.mutations,
    }
    clean: dict[str, Any] = redacted_values(_plain(record), _DEEPEST)
    return clean


def _worker(worker: WorkerReport, run: Run) -> dict[str, Any]:
    log = (worker.stats or SwayStats()).log
    return {
        "error": worker.error,
        "events": [_event(event, run.started) for event in log.events],
        "left_out": log.left_out,
    }


def _event(event: Event, started: float) -> dict[str, Any]:
    return {
        "at": round(max(0.0, event.at - started), 3),
        "event": event.event,
        "spec": event.spec,
        "count": event.times,
        "seconds": None if event.seconds is None else round(event.seconds, 3),
        "bytes": event.nbytes,
        "resident_bytes": event.resident,
    }


def _plain(value: Any) -> Any:
    """Return ``value`` in JSON's types: the configuration may hold dates, infinity and NaN."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return finite(value) if value is None or isinstance(value, bool | int | float | str) else str(value)
