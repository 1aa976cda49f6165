"""What happened in a run, as plain built-in types that can be sent between processes and merged."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(slots=True)
class BackendStats:
    """What happened to one backend, or to one shared base.

    Attributes:
        loads: Loads that succeeded.
        hits: Requests that were served without a load.
        failures: Loads that failed.
        evictions: Closes to make room.
        load_seconds: Seconds spent in the loads that succeeded, without the import of libraries.
        base: The name of the shared base that it uses; empty where it shares none.
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
        """Mean seconds of a load; 0.0 where none succeeded."""
        return self.load_seconds / self.loads if self.loads else 0.0


@dataclass(slots=True)
class RecallStats:
    """What one base answered from memory.

    Attributes:
        answers: How many answers.
        seconds: What they took when they were computed.
    """

    answers: int = 0
    seconds: float = 0.0

    def add(self, other: RecallStats) -> None:
        """Add another's counts to these."""
        self.answers += other.answers
        self.seconds += other.seconds


@dataclass(slots=True)
class SwayStats:
    """What happened in one process, or in several after `merge`.

    Attributes:
        backends: By the spec's label.
        bases: The loads of shared bases, by the base's name; they are part of the backends' load seconds.
        recalled: What bases answered from memory, by the base's name.
        fetched: One line for each adapter that was fetched from a hub; its seconds are not part of the load seconds.
        import_seconds: Seconds spent on importing libraries such as torch, once in each process.
        peak_resident: The most backends that were loading, ready or closing at one time.
        peak_bytes: The most bytes of weights that were resident at one time, as far as their sizes are known.
        close_errors: One line for each ``close()`` that raised.
        mutations: One line for each test that left a backend changed.
        leaks: One line for each close after which weights were still in memory.
        hook_errors: One line for each hook, and each look for leaks, that raised.
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

    def backend(self, label: str) -> BackendStats:
        """The counts of one backend, made on first use."""
        return self.backends.setdefault(label, BackendStats())

    def base_loaded(self, name: str, seconds: float) -> None:
        """Count one load of a shared base."""
        self.bases.setdefault(name, BackendStats()).add(BackendStats(loads=1, load_seconds=seconds))

    def base_recalled(self, name: str, answers: int, seconds: float) -> None:
        """Count answers that a base gave from memory."""
        self.recalled.setdefault(name, RecallStats()).add(RecallStats(answers, seconds))

    def total(self) -> BackendStats:
        """The sum over all backends."""
        total = BackendStats()
        for stats in self.backends.values():
            total.add(stats)
        total.base = ""
        return total

    def saved_seconds(self) -> float:
        """Seconds of loading that a run without cache and shared bases would have spent besides, estimated.

        Each hit would have been a load of its base and its adapter, and each load that found its base there would
        have loaded that base too, at the mean cost of the loads that were measured.
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
        """Add what happened in another process; peaks are per process, so the larger one stays.

        Args:
            other: What happened there.
            origin: The other process's name, put before each of its lines.
        """
        for mine, theirs in ((self.backends, other.backends), (self.bases, other.bases)):
            for label, stats in theirs.items():
                mine.setdefault(label, BackendStats()).add(stats)
        for name, recalled in other.recalled.items():
            self.recalled.setdefault(name, RecallStats()).add(recalled)
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
        """All of it as dicts, lists, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        return cls(
            **{
                **values,
                "backends": {label: BackendStats(**stats) for label, stats in values["backends"].items()},
                "bases": {label: BackendStats(**stats) for label, stats in values["bases"].items()},
                "recalled": {name: RecallStats(**stats) for name, stats in values["recalled"].items()},
            }
        )


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What one worker handed back.

    Attributes:
        name: The worker's, such as ``gw0``.
        stats: What happened in it, or ``None`` where it used no backend or did not live to say so.
        error: How it ended without handing back anything, or ``None``.
        loading: What it was loading then.
    """

    name: str
    stats: SwayStats | None
    error: str | None = None
    loading: tuple[str, ...] = ()
