"""The machine that several workers share: what each of them gets of its processors, and its turn among the devices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

_CHOSEN: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""By any of these a user has chosen how many threads torch uses."""

WORKER_SLOT: Final = "PYTEST_SWAY_WORKER_SLOT"
"""Holds a worker's number among those on its machine. A worker that replaces one that crashed has the number of that,
and a process that a worker starts has the worker's."""


def worker_slot() -> int:
    """Return this process's number among the workers on its machine; 0 where there are no workers."""
    slot = os.environ.get(WORKER_SLOT, "")
    return int(slot) if slot.isdecimal() else 0


def usable_processors(root: Path = Path("/")) -> int:
    """Return how many processors this process may use: by its affinity, and by the quota of its control group.

    Args:
        root: The file system's root.
    """
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        count = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count()
    return max(1, min([count or 1, *(int(quota) for quota in _quotas(root))]))


def threads_for(workers: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that give each of ``workers`` processes its share of the processors.

    They set the threads within one operation, of torch and of what else uses OpenMP or MKL. torch's other pool, for
    operations side by side, starts only in code compiled by ``torch.jit``, and can be sized once in a process: that is
    left to the user.

    Args:
        workers: How many processes share the machine, at least 1.
        environment: What they inherit; where it says how many threads to use, that stays.
    """
    variables = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(max(1, usable_processors() // workers))}
    if any(name in environment for name in _CHOSEN):
        del variables["OMP_NUM_THREADS"]
    return {name: value for name, value in variables.items() if name not in environment}


def _quotas(root: Path) -> Iterator[float]:
    """The quotas of this process's control groups, in processors, of both versions of the kernel's interface.

    loky counts them too; for these lines it would be a dependency of every run.
    """
    folder = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError):
        quota = int((folder / "cpu/cpu.cfs_quota_us").read_text())
        if quota > 0:
            yield quota / int((folder / "cpu/cpu.cfs_period_us").read_text())
    groups = [folder]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                path = folder / line.removeprefix("0::/")
                groups += [path, *path.parents[: len(path.parts) - len(folder.parts)]]
    for group in groups:
        with suppress(OSError, ValueError):
            limit, period = (group / "cpu.max").read_text().split()
            if limit != "max":
                yield int(limit) / int(period)
