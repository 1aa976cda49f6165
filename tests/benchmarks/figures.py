"""A figure: a promise, its measurement, and whether the promise holds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType


@dataclass(frozen=True)
class Figure:
    """One promise and its measurement, both in the same unit.

    Attributes:
        name: Its name.
        promised: The promised bound.
        measured: The measured value.
        detail: The numbers behind it.
        at_least: Whether the bound is a minimum; by default it is a maximum.
    """

    name: str
    promised: float
    measured: float
    detail: str = ""
    at_least: bool = False

    @property
    def kept(self) -> bool:
        return self.measured >= self.promised if self.at_least else self.measured <= self.promised

    def row(self) -> str:
        verdict = "kept" if self.kept else "BROKEN"
        bound = f"{'>=' if self.at_least else '<='} {self.promised:.4g}"
        return f"{self.name:<62} {bound:>9} {self.measured:>9.4g}  {verdict:<7} {self.detail}"


def ratio(name: str, promised: float, ours: Sequence[float], theirs: Sequence[float], unit: str = "s") -> Figure:
    """Return the figure of the ratio of two medians.

    Args:
        name: Its name.
        promised: The promised maximum.
        ours: Measured values.
        theirs: As many of what they are compared with.
        unit: Their unit.
    """
    detail = f"medians of {len(ours)}: {median(ours):.2f} {unit}, {median(theirs):.2f} {unit}"
    return Figure(name, promised, median(ours) / median(theirs), detail)


@dataclass(frozen=True)
class Run:
    """The time and memory of a child process.

    Attributes:
        seconds: Its wall time.
        cpu_seconds: Its processor time, in all threads.
        peak_bytes: Its peak resident memory.
        output: What it wrote.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def run(
    arguments: Sequence[str],
    folder: Path,
    variables: Mapping[str, str | None] = MappingProxyType({}),
    python: str | Path = sys.executable,
) -> Run:
    """Run ``python arguments`` in ``folder`` and measure its wall time, its processor time and its peak memory.

    Args:
        arguments: Python's arguments.
        folder: The working directory.
        variables: Changes to the environment; ``None`` removes a variable.
        python: The interpreter.
    """
    changed = {**os.environ, "PYTHONDONTWRITEBYTECODE": None, **variables}  # as any run but the first
    environment = {name: value for name, value in changed.items() if value is not None}
    started = time.perf_counter()
    with open(folder / "output.txt", "w+", encoding="utf-8") as output:
        child = subprocess.Popen([str(python), *arguments], cwd=folder, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {child.returncode}:\n{text}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text)


def turns(
    rounds: int, clock: Callable[[], float] = time.perf_counter, /, **sides: Callable[[], object]
) -> dict[str, list[float]]:
    """Return each side's seconds in each turn; the sides take turns, so that all see the same load on the machine.

    Args:
        rounds: The number of turns of each.
        clock: Returns the time in seconds.
        sides: The measured functions, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = clock()
            side()
            seconds[name].append(clock() - started)
    return seconds


def medians(
    rounds: int, clock: Callable[[], float] = time.perf_counter, /, **sides: Callable[[], object]
) -> dict[str, float]:
    """Return each side's median seconds; see `turns`."""
    return {name: median(taken) for name, taken in turns(rounds, clock, **sides).items()}


def times(seconds: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Return the median of one side's seconds in a turn, divided by another's in the same turn.

    The machine's speed changes from turn to turn. The ratio of the medians would compare different turns.
    """
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
