"""The counts of a run, as plain values that can be sent between processes and merged."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any, Final, NamedTuple, Self

_MOST_EVENTS: Final = 5_000
_ONE_EVENT: Final = 1.0
"""Seconds within which the hits of a backend are one event."""


@dataclass(slots=True)
class BackendStats:
    """The counts of one backend, or of one shared base.

    Attributes:
        loads: Loads that succeeded.
        hits: Requests served without a load.
        failures: Loads that failed.
        evictions: Closes to make room.
        load_seconds: Seconds spent in successful loads, without imports of libraries.
        base: The name of its shared base; empty if it shares none.
    """

    loads: int = 0
    hits: int = 0
    failures: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    base: str = ""

    def add(self, other: BackendStats) -> None:
        """Add another's counts to these."""
        self.loads += other.loads
        self.hits += other.hits
        self.failures += other.failures
        self.evictions += other.evictions
        self.load_seconds += other.load_seconds
        self.base = self.base or other.base

    @property
    def seconds_per_load(self) -> float:
        """Mean seconds of a successful load; 0.0 if none succeeded."""
        return self.load_seconds / self.loads if self.loads else 0.0


@dataclass(slots=True)
class RecallStats:
    """The answers that one base gave from its answer cache.

    Attributes:
        answers: Their number.
        seconds: The seconds that computing them had taken.
    """

    answers: int = 0
    seconds: float = 0.0

    def add(self, other: RecallStats) -> None:
        """Add another's counts to these."""
        self.answers += other.answers
        self.seconds += other.seconds


class Event(NamedTuple):
    """Something that happened to a backend.

    Attributes:
        at: When, in seconds of `time.time`.
        event: ``load`` (it is ready), ``failure`` (of a load), ``hit``, ``evict`` (it is to make room) or ``close``
            (its memory is given back).
        spec: The backend's label.
        times: How often, of ``hit``.
        seconds: How long the load took, without the import of libraries.
        nbytes: Of its weights, a shared base included, where their size is known.
        resident: Bytes of all weights that are loaded now, each once, where their sizes are known.
    """

    at: float
    event: str
    spec: str
    times: int = 1
    seconds: float | None = None
    nbytes: int | None = None
    resident: int | None = None


@dataclass(slots=True)
class EventLog:
    """What happened when, in one process; the first thousands of events.

    Attributes:
        events: In their order.
        left_out: How many came when there was no room for more.
    """

    events: list[Event] = field(default_factory=list)
    left_out: int = 0
    _hits: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    """How many hits of each backend are in the log."""
    _last: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Where each backend's last event is."""

    def note(self, event: str, spec: str, **values: Any) -> None:
        """Add an event of now."""
        if len(self.events) >= _MOST_EVENTS:
            self.left_out += 1
            return
        self._last[spec] = len(self.events)
        self.events.append(Event(time.time(), event, spec, **values))

    def note_hits(self, backends: dict[str, BackendStats]) -> None:
        """Add the hits since this was last called. A request itself notes nothing, since it takes microseconds."""
        for spec, stats in backends.items():
            times = stats.hits - self._hits.get(spec, 0)
            if not times:
                continue
            self._hits[spec] = stats.hits
            at = self._last.get(spec)
            last = None if at is None else self.events[at]
            if at is not None and last is not None and last.event == "hit" and time.time() - last.at < _ONE_EVENT:
                self.events[at] = last._replace(times=last.times + times)
            else:
                self.note("hit", spec, times=times)


@dataclass(slots=True)
class SwayStats:
    """The counts of one process, or of several after `merge`.

    Attributes:
        backends: Counts by the label of the spec.
        bases: Loads of shared bases by name. Their seconds are part of the backends' load seconds.
        recalled: Answers from the answer cache, by the base's name.
        fetched: One line for each adapter fetched from a hub. Its seconds are not part of the load seconds.
        import_seconds: Seconds spent importing libraries such as torch, once in each process.
        peak_resident: The most backends that were loading, ready or closing at one time.
        peak_bytes: The most bytes of weights that were resident at one time; unknown sizes count as 0.
        close_errors: One line for each ``close()`` that raised.
        mutations: One message for each test that left a backend changed.
        leaks: One message for each close after which weights were still in memory.
        hook_errors: One line for each hook, or leak check, that raised.
        log: The events of one process; not merged.
        specs: The specs of what was loaded, by label or configured name: their fields and the digest of their files.
        versions: The versions of the imported libraries.
        devices: The devices of what was loaded: torch's name, and the name of the hardware.
    """

    backends: dict[str, BackendStats] = field(default_factory=dict)
    bases: dict[str, BackendStats] = field(default_factory=dict)
    recalled: dict[str, RecallStats] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    import_seconds: float = 0.0
    peak_resident: int = 0
    peak_bytes: int = 0
    close_errors: list[str] = field(default_factory=list)
    mutations: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    hook_errors: list[str] = field(default_factory=list)
    log: EventLog = field(default_factory=EventLog)
    specs: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)

    def backend(self, label: str) -> BackendStats:
        """Return the counts of one backend, creating them on first use."""
        return self.backends.setdefault(label, BackendStats())

    def base_loaded(self, name: str, seconds: float) -> None:
        """Count one load of a shared base."""
        self.bases.setdefault(name, BackendStats()).add(BackendStats(loads=1, load_seconds=seconds))

    def base_recalled(self, name: str, answers: int, seconds: float) -> None:
        """Count answers that a base gave from its answer cache."""
        self.recalled.setdefault(name, RecallStats()).add(RecallStats(answers, seconds))

    def note_spec(self, name: str, noted: dict[str, Any]) -> None:
        """Keep a spec's fields and digest by its name; a second spec of one name gets a number."""
        for number in count(1):
            key = name if number == 1 else f"{name} ({number})"
            if self.specs.setdefault(key, noted)["fields"] == noted["fields"]:
                return

    def total(self) -> BackendStats:
        """Return the sum over all backends."""
        total = BackendStats()
        for stats in self.backends.values():
            total.add(stats)
        total.base = ""
        return total

    def saved_seconds(self) -> float:
        """Estimate the seconds of loading that the cache and the shared bases have saved.

        Without them, each hit would load its base and its adapter, and each adapter load that shared a base would load
        that base too. Each of these costs the mean of the measured loads.
        """
        saved = 0.0
        for backend in self.backends.values():
            if backend.base not in self.bases:
                saved += backend.hits * backend.seconds_per_load
        for name, base in self.bases.items():
            users = BackendStats()
            for backend in self.backends.values():
                if backend.base == name:
                    users.add(backend)
            adapters = max(0.0, users.load_seconds - base.load_seconds)
            per_adapter = adapters / users.loads if users.loads else 0.0
            reuses = max(0, users.loads - base.loads)
            saved += users.hits * (per_adapter + base.seconds_per_load) + reuses * base.seconds_per_load
        return saved

    def merge(self, other: SwayStats, *, origin: str | None = None) -> None:
        """Add the counts of another process; of the peaks, which are per process, keep the larger.

        Args:
            other: The counts of the other process.
            origin: Its name, put before each of its lines.
        """
        for mine, theirs in ((self.backends, other.backends), (self.bases, other.bases)):
            for label, stats in theirs.items():
                mine.setdefault(label, BackendStats()).add(stats)
        for name, recalled in other.recalled.items():
            self.recalled.setdefault(name, RecallStats()).add(recalled)
        for name, noted in other.specs.items():
            self.note_spec(name, noted)
        self.versions = {**other.versions, **self.versions}
        self.devices = {**other.devices, **self.devices}
        self.import_seconds += other.import_seconds
        self.peak_resident = max(self.peak_resident, other.peak_resident)
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)
        for ours, lines in (
            (self.fetched, other.fetched),
            (self.close_errors, other.close_errors),
            (self.mutations, other.mutations),
            (self.leaks, other.leaks),
            (self.hook_errors, other.hook_errors),
        ):
            ours.extend(lines if origin is None else (f"{origin}: {line}" for line in lines))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as dicts, lists, strings and numbers."""
        log = {"events": [list(event) for event in self.log.events], "left_out": self.log.left_out}
        return {**asdict(replace(self, log=EventLog())), "log": log}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild the counts from `as_dict`."""
        return cls(
            **{
                **values,
                "backends": {label: BackendStats(**stats) for label, stats in values["backends"].items()},
                "bases": {label: BackendStats(**stats) for label, stats in values["bases"].items()},
                "recalled": {name: RecallStats(**stats) for name, stats in values["recalled"].items()},
                "log": EventLog([Event(*each) for each in values["log"]["events"]], values["log"]["left_out"]),
            }
        )


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """The result of one worker.

    Attributes:
        name: The worker's name, such as ``gw0``.
        stats: Its counts, or ``None`` if it used no backend or ended without a report.
        error: How it ended without a report, or ``None``.
        loading: The specs that it was loading at that time.
    """

    name: str
    stats: SwayStats | None
    error: str | None = None
    loading: tuple[str, ...] = ()
