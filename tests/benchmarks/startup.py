"""The plugin's cost in a run that does not use it, in an environment with pytest and nothing else.

pytest reads the list of a plugin's files (RECORD), twice as many as its modules, to rewrite their assertions. So a
plugin with a list of one file is measured, too.
"""

from __future__ import annotations

import compileall
import os
import re
import shutil
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from statistics import median
from typing import Final

import pytest_sway
from tests.benchmarks.figures import Figure, run

PAIRS: Final = 30
COLLECT: Final = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
APART: Final = {"PYTHONPATH": None, "PYTEST_ADDOPTS": None, "PYTEST_PLUGINS": None}


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = folder / "tests"
        tests.mkdir()
        (tests / "test_empty.py").write_text("def test_nothing(): pass\n")
        pythons = {
            "ours": _environment(folder / "ours", plugin=True),
            "one file": _environment(folder / "one", plugin=True, listed=1),
            "none": _environment(folder / "none", plugin=False),
        }
        seconds: dict[str, list[float]] = {side: [] for side in pythons}
        for turn in range(-1, PAIRS):  # a first run writes bytecode
            for side, python in pythons.items():
                done = run(COLLECT, tests, APART, python)
                if turn >= 0:
                    seconds[side].append(done.cpu_seconds)
    ours, one, without = (median(taken) for taken in seconds.values())
    yield Figure(
        "collecting, plugin unused / pytest and nothing else, CPU",
        1.03,
        ours / without,
        f"medians of {PAIRS} rounds: {ours * 1e3:.0f} ms, {without * 1e3:.0f} ms",
    )
    yield Figure(
        "the same, where pytest reads a list of one file of the plugin",
        1.03,
        one / without,
        f"{one * 1e3:.0f} ms; the rest is pytest's reading of the list",
    )


def _environment(folder: Path, *, plugin: bool, listed: int | None = None) -> Path:
    """Make an environment of the distributions that are installed here, and return its interpreter.

    Args:
        folder: Where to make it.
        plugin: Whether it has the plugin, beside pytest and what pytest needs.
        listed: How many of the plugin's files its list has; ``None`` for all, as pip lists them.
    """
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in sorted(_with_needs("pytest")):
        _copy(distribution(name), packages)
    if plugin:
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


def _install_plugin(packages: Path, listed: int | None) -> None:
    """Install the plugin as pip does from a wheel, even if it is an editable install here."""
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
    digest = "sha256=" + "0" * 43
    lines = [f"{path},{digest},1000\n" for path in sorted(paths, key=lambda path: path != "pytest_sway/__init__.py")]
    (info / "RECORD").write_text("".join(lines[:listed]), "utf-8")
