"""The versions of imported libraries, and the names of the hardware behind devices."""

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
