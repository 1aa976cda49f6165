"""The plugin's cost in a run that does not use it, in an environment with pytest and nothing else.

pytest reads the list of a plugin's files (RECORD), to rewrite their assertions. pip lists the bytecode, too, which
doubles the list; uv does not. A plugin with a list of one file shows what is not the list.
"""

from __future__ import annotations

import compileall
import os
import re
import shutil
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path
from statistics import median
from typing import Final

import pytest_sway
from tests.benchmarks.figures import Figure, run

PAIRS: Final = 60
COLLECT: Final = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
APART: Final = {"PYTHONPATH": None, "PYTEST_ADDOPTS": None, "PYTEST_PLUGINS": None}


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = folder / "tests"
        tests.mkdir()
        (tests / "test_empty.py").write_text("def test_nothing(): pass\n")
        pythons = {
            "pip": _environment(folder / "pip", listed=_by_pip),
            "uv": _environment(folder / "uv", listed=_by_uv),
            "one file": _environment(folder / "one", listed=_one_file),
            "none": _environment(folder / "none"),
        }
        seconds: dict[str, list[float]] = {side: [] for side in pythons}
        for turn in range(-1, PAIRS):  # a first run writes bytecode
            for side, python in pythons.items():
                done = run(COLLECT, tests, APART, python)
                if turn >= 0:
                    seconds[side].append(done.cpu_seconds)
    pip, uv, one, without = (median(taken) for taken in seconds.values())
    by_pip, by_uv, by_one = (_ratio(seconds[side], seconds["none"]) for side in ("pip", "uv", "one file"))
    yield Figure(
        "collecting, plugin unused / pytest and nothing else, CPU",
        1.03,
        by_pip,
        f"the median ratio of {PAIRS} rounds; medians {pip * 1e3:.0f} ms, {without * 1e3:.0f} ms",
    )
    yield Figure("the same, installed by uv", 1.03, by_uv, f"{uv * 1e3:.0f} ms")
    yield Figure(
        "the same, where pytest reads a list of one file of the plugin",
        1.03,
        by_one,
        f"{one * 1e3:.0f} ms; the rest is pytest's reading of the list",
    )


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios of each round, since a machine's speed changes between rounds."""
    return median(first / second for first, second in zip(seconds, others, strict=True))


def _by_pip(path: str) -> bool:
    return True


def _by_uv(path: str) -> bool:
    return not path.endswith(".pyc")


def _one_file(path: str) -> bool:
    return path == "pytest_sway/__init__.py"


def _environment(folder: Path, listed: Callable[[str], bool] | None = None) -> Path:
    """Make an environment of the distributions that are installed here, and return its interpreter.

    Args:
        folder: Where to make it.
        listed: Which of the plugin's files are in its list; ``None`` for an environment without the plugin, with pytest
            and what pytest needs.
    """
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in sorted(_with_needs("pytest")):
        _copy(distribution(name), packages)
    if listed is not None:
        _install_plugin(packages, listed)
    compileall.compile_dir(packages, quiet=2)
    return folder / "bin" / "python"


def _with_needs(name: str, found: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the names of a distribution and of those that it needs here, without its extras."""
    found |= {name}
    for need in distribution(name).requires or ():
        needed = re.split(r"[\s;<>=!~\[(]", need, maxsplit=1)[0].lower()
        if needed not in found and "extra ==" not in need and _is_installed(needed):
            found = _with_needs(needed, found)
    return found


def _is_installed(name: str) -> bool:
    return any(Distribution.discover(name=name))


def _copy(source: Distribution, packages: Path) -> None:
    for file in source.files or ():
        if ".." not in file.parts and file.suffix != ".pyc":
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), packages / file)


def _install_plugin(packages: Path, listed: Callable[[str], bool]) -> None:
    """Install the plugin from its wheel's files, even if it is an editable install here."""
    package = packages / "pytest_sway"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(pytest_sway.__file__).parent, package, ignore=ignored)
    compileall.compile_dir(package, quiet=2)
    source = distribution("pytest-sway")
    info = packages / f"pytest_sway-{source.version}.dist-info"
    info.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (info / name).write_text(source.read_text(name) or "", "utf-8")
    paths = (os.path.relpath(path, packages) for path in (*package.rglob("*"), *info.iterdir()) if path.is_file())
    lines = (_line(path) for path in paths if listed(path))
    (info / "RECORD").write_text("".join(lines), "utf-8")


def _line(path: str) -> str:
    """Return the entry of a file, as pip writes it: bytecode, which it makes itself, has neither digest nor size."""
    return f"{path},,\n" if path.endswith(".pyc") else f"{path},sha256={'0' * 43},1000\n"
