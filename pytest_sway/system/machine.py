"""Share a machine among workers: the threads that each one uses, and its number, which picks a device.

Also the names of its hardware, and the versions of imported libraries, for reports.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

_CHOSEN: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which you choose how many threads torch uses."""

WORKER_SLOT: Final = "PYTEST_SWAY_WORKER_SLOT"
"""The variable with a worker's number on its machine. A worker that replaces a crashed one gets the same number, and
subprocesses of a worker inherit it."""


def worker_slot() -> int:
    """Return this process's number among the workers on its machine; 0 where there are no workers."""
    slot = os.environ.get(WORKER_SLOT, "")
    return int(slot) if slot.isdecimal() else 0


def usable_processors(root: Path = Path("/")) -> int:
    """Return how many processors this process may use, by its affinity and its cgroup's quota; at least 1.

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

    They set the threads within one operation, for torch and all else that uses OpenMP or MKL. torch's second pool,
    between operations, is left to you: only code compiled by ``torch.jit`` starts it, and a process can size it only
    once.

    Args:
        workers: How many processes share the machine, at least 1.
        environment: The variables that they inherit. A number of threads that is set there stays.
    """
    variables = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(max(1, usable_processors() // workers))}
    if any(name in environment for name in _CHOSEN):
        del variables["OMP_NUM_THREADS"]
    return {name: value for name, value in variables.items() if name not in environment}


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas of this process's cgroups (v1 and v2), in processors.

    loky counts them too, but would be a dependency of every run.
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


_LIBRARIES: Final = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "mlx": "mlx",
    "mlx_lm": "mlx-lm",
    "httpx": "httpx",
    "numpy": "numpy",
    "scipy": "scipy",
    "xdist": "pytest-xdist",
    "pytest": "pytest",
    "pytest_sway": "pytest-sway",
}
"""The distribution's name by the name of the imported module."""


def imported_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect results and that this process has imported."""
    found = {"python": platform.python_version()}
    for module, package in _LIBRARIES.items():
        if module in sys.modules:
            with suppress(PackageNotFoundError):  # a source folder that is not installed
                found[package] = version(package)
    return found


def device_names(devices: Iterable[str]) -> dict[str, str]:
    """Return the name of the hardware behind each of torch's devices; empty if it is unknown."""
    return {device: _name(device) for device in sorted(devices)}


def _name(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    torch = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda"):
        with suppress(Exception):  # a driver's error must not fail the run
            return str(torch.cuda.get_device_name(device))
    return ""
