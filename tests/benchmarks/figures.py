"""A figure: what is promised, what was measured, and whether that is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class Figure:
    """One promise and its measurement, both in the same unit; smaller is better."""

    name: str
    promised: float
    measured: float
    detail: str = ""

    @property
    def kept(self) -> bool:
        return self.measured <= self.promised

    def row(self) -> str:
        verdict = "kept" if self.kept else "BROKEN"
        return f"{self.name:<62} {self.promised:>8.4g} {self.measured:>9.4g}  {verdict:<7} {self.detail}"


@dataclass(frozen=True)
class Run:
    """What a child process took."""

    seconds: float
    peak_bytes: int
    output: str


def run(arguments: Sequence[str], folder: Path, variables: Mapping[str, str | None] = MappingProxyType({})) -> Run:
    """Run ``python arguments`` in ``folder`` and measure its wall time and its peak resident memory.

    Args:
        arguments: What python is given.
        folder: The working directory.
        variables: What is changed in the environment; ``None`` takes a variable out of it.
    """
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    started = time.perf_counter()
    with open(folder / "output.txt", "w+", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {child.returncode}:\n{text}")
    return Run(seconds, usage.ru_maxrss * 1024, text)
