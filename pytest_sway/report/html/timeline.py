"""What a worker loaded, found and evicted, and how much memory that took, over the seconds of the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pytest_sway.report.html.axes import Axis
from pytest_sway.report.html.words import size, times

_TALL: Final = 100
_TOLD: Final = 5
"""How many times of one kind are named."""


@dataclass(slots=True)
class Lane:
    """What happened to one spec in one worker.

    Attributes:
        spec: Its name.
        loads: When each load began and ended, in seconds.
        stays: When it began and ended to be in memory.
        hits: When it was found there.
        evictions: When it was closed to make room.
    """

    spec: str
    loads: list[tuple[float, float]] = field(default_factory=list)
    stays: list[tuple[float, float]] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    evictions: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all its loads."""
        return sum(end - begin for begin, end in self.loads)

    def told(self) -> str:
        """What is drawn, in words."""
        said = [f"{self.spec}: loaded at {_seconds(begin for begin, _ in self.loads)}"]
        if self.hits:
            said.append(times(len(self.hits), "hit"))
        if self.evictions:
            said.append(f"evicted at {_seconds(self.evictions)}")
        return ", ".join(said)


@dataclass(slots=True)
class Worker:
    """One worker's part of the time line.

    Attributes:
        name: The worker's.
        lanes: One for each spec, in the order of their first events.
        peak: The most memory at one time, in words; empty where no size is known.
        memory: The path of the memory, over the width of the axis in percent and 0 to 100.
    """

    name: str
    lanes: list[Lane]
    peak: str
    memory: str


def workers(record: Mapping[str, Any]) -> tuple[Axis, list[Worker]]:
    """The seconds of the run, and what each worker did in them."""
    found: Mapping[str, Any] = record.get("workers") or {}
    events = {name: sorted(worker.get("events") or (), key=_when) for name, worker in found.items()}
    seconds = (record.get("run") or {}).get("seconds") or 0.0
    axis = Axis.over([seconds, *(event["at"] for each in events.values() for event in each)])
    end = max([seconds, *(event["at"] for each in events.values() for event in each)])
    return axis, [_worker(name, each, axis, end) for name, each in events.items() if each]


def _when(event: Mapping[str, Any]) -> float:
    return float(event["at"])


def _worker(name: str, events: Sequence[Mapping[str, Any]], axis: Axis, end: float) -> Worker:
    lanes: dict[str, Lane] = {}
    held: dict[str, tuple[float, float]] = {}  # since when, and how much
    steps, peak = [(0.0, 0.0)], 0.0
    for event in events:
        at, spec = _when(event), str(event.get("spec"))
        lane = lanes.setdefault(spec, Lane(spec))
        if event["event"] == "load":
            lane.loads.append((max(at - (event.get("seconds") or 0.0), 0.0), at))
            held[spec] = (at, event.get("bytes") or 0.0)
        elif event["event"] == "hit":
            lane.hits.append(at)
            continue
        elif event["event"] == "evict":
            lane.evictions.append(at)
            lane.stays.append((held.pop(spec, (0.0, 0.0))[0], at))
        steps.append((at, sum(taken for _, taken in held.values())))
        peak = max(peak, steps[-1][1])
    for spec, (since, _) in held.items():
        lanes[spec].stays.append((since, end))
    return Worker(name, list(lanes.values()), size(peak), "".join(_area(steps, peak, axis, end)) if peak else "")


def _area(steps: Sequence[tuple[float, float]], peak: float, axis: Axis, end: float) -> Iterator[str]:
    yield f"M{axis.at(0.0)} {_TALL}"
    for at, taken in steps:
        yield f"H{axis.at(at)}V{round(_TALL * (1 - taken / peak))}"
    yield f"H{axis.at(end)}V{_TALL}z"


def _seconds(moments: Iterable[float]) -> str:
    listed = [f"{each:.1f} s" for each in moments]
    more = f" and {len(listed) - _TOLD} times more" if len(listed) > _TOLD else ""
    return ", ".join(listed[:_TOLD]) + more
