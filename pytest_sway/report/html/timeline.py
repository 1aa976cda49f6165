"""The time line of each worker: its loads, hits and evictions, and the memory of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pytest_sway.report.html.axes import Axis
from pytest_sway.report.html.words import times
from pytest_sway.system.wording import format_bytes

_TALL: Final = 100
_TOLD: Final = 5
"""How many moments of one kind are listed."""


@dataclass(slots=True)
class Lane:
    """One backend's events in one worker, in seconds since the start of the run.

    Attributes:
        spec: The backend's name.
        loads: The start and end of each load.
        failures: The moments of failed loads.
        stays: The start and end of each period in memory.
        hits: The moments of hits.
        count: The number of hits; one moment may stand for several.
        evictions: The moments of evictions.
    """

    spec: str
    loads: list[tuple[float, float]] = field(default_factory=list)
    failures: list[float] = field(default_factory=list)
    stays: list[tuple[float, float]] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    count: int = 0
    evictions: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the seconds of all its loads."""
        return sum(end - begin for begin, end in self.loads)

    def told(self) -> str:
        """Return the lane's events in words."""
        said = [
            f"{what} at {_seconds(moments)}"
            for what, moments in (
                ("loaded", [begin for begin, _ in self.loads]),
                ("failed to load", self.failures),
                ("evicted", self.evictions),
            )
            if moments
        ]
        if self.count:
            said.append(times(self.count, "hit"))
        return f"{self.spec}: {', '.join(said)}"


@dataclass(slots=True)
class Worker:
    """One worker's part of the time line.

    Attributes:
        name: The worker's name.
        lanes: One lane for each backend, in the order of their first events.
        peak: The peak memory, in words; empty if no size is known.
        memory: The path of the memory curve: x in percent of the axis, y from 0 to 100.
        notes: Remarks, such as the worker's error and the number of events left out.
    """

    name: str
    lanes: list[Lane]
    peak: str
    memory: str
    notes: list[str]


def workers(record: Mapping[str, Any]) -> tuple[Axis, list[Worker]]:
    """Return the axis of the run's seconds, and each worker's part of the time line."""
    found: Mapping[str, Any] = record.get("workers") or {}
    events = {name: sorted(worker.get("events") or (), key=_when) for name, worker in found.items()}
    end = max([0.0, record["run"]["seconds"], *(_when(event) for each in events.values() for event in each)])
    axis = Axis.over([end])
    drawn = [_worker(name, each, found[name], axis, end) for name, each in events.items()]
    return axis, [worker for worker in drawn if worker.lanes or worker.notes]


def _when(event: Mapping[str, Any]) -> float:
    return float(event["at"])


def _worker(name: str, events: Sequence[Mapping[str, Any]], told: Mapping[str, Any], axis: Axis, end: float) -> Worker:
    lanes: dict[str, Lane] = {}
    since: dict[str, float] = {}
    for event in events:
        at, spec = _when(event), str(event["spec"])
        lane = lanes.setdefault(spec, Lane(spec))
        match event["event"]:
            case "load":
                lane.loads.append((max(at - (event.get("seconds") or 0.0), 0.0), at))
                since[spec] = at
            case "failure":
                lane.failures.append(at)
            case "hit":
                lane.hits.append(at)
                lane.count += event.get("count") or 1
            case "evict":
                lane.evictions.append(at)
            case "close" if spec in since:
                lane.stays.append((since.pop(spec), at))
    for spec, began in since.items():
        lanes[spec].stays.append((began, end))
    resident = [(_when(event), event["resident_bytes"]) for event in events if event.get("resident_bytes") is not None]
    peak = max((taken for _, taken in resident), default=0)
    notes = [told["error"]] if told.get("error") else []
    if told.get("left_out"):
        notes.append(f"{times(told['left_out'], 'later event')} left out")
    memory = "".join(_area(resident, peak, axis, end)) if peak else ""
    return Worker(name, list(lanes.values()), format_bytes(peak) if peak else "", memory, notes)


def _area(steps: Sequence[tuple[float, int]], peak: int, axis: Axis, end: float) -> Iterator[str]:
    yield f"M{axis.at(0.0)} {_TALL}"
    for at, taken in steps:
        yield f"H{axis.at(at)}V{round(_TALL * (1 - taken / peak))}"
    yield f"H{axis.at(end)}V{_TALL}z"


def _seconds(moments: Iterable[float]) -> str:
    listed = [f"{each:.1f} s" for each in moments]
    more = f" and {times(len(listed) - _TOLD, 'time')} more" if len(listed) > _TOLD else ""
    return ", ".join(listed[:_TOLD]) + more
