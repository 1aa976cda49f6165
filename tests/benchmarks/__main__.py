"""Measure every promised figure, or those named: ``python -m tests.benchmarks [NAME ...]``, with names from `ALL`."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Final

ALL: Final = (
    "startup",
    "first",
    "warm",
    "hygiene",
    "loading",
    "sharing",
    "suite",
    "session_fixture",
    "workers",
    "dealing",
    "threads",
    "scoring",
    "generation",
    "heads",
    "quant",
    "compare",
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description="Measure every figure that is promised.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(ALL)}; all where none is named")
    names = parser.parse_args(arguments).names
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such name; there are {', '.join(ALL)}")
    broken = 0
    print(f"{'figure':<62} {'promised':>9} {'measured':>9}")
    for name in names or ALL:
        for figure in importlib.import_module(f"tests.benchmarks.{name}").figures():
            print(figure.row(), flush=True)
            broken += not figure.kept
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
