"""What a run computed with: the versions of libraries that are imported anyway, and the names of devices."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Final

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
"""By the name of the package that is imported, the name of the one that is installed."""


def imported_versions() -> dict[str, str]:
    """Return the versions of Python and of those libraries that are imported in this process and decide its numbers."""
    found = {"python": platform.python_version()}
    for module, package in _LIBRARIES.items():
        if module in sys.modules:
            with suppress(PackageNotFoundError):  # of a source folder that is not installed
                found[package] = version(package)
    return found


def device_names(devices: Iterable[str]) -> dict[str, str]:
    """Return the names of the hardware behind torch's names of devices; empty where they are not known."""
    return {device: _name(device) for device in sorted(devices)}


def _name(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    torch = sys.modules.get("torch")
    if torch is not None and device.startswith("cuda"):
        with suppress(Exception):  # what a driver raises fails no run
            return str(torch.cuda.get_device_name(device))
    return ""
