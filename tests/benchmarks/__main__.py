"""Measure every figure that is promised: ``python -m tests.benchmarks [NAME ...]``, with the names that `ALL` has."""

from __future__ import annotations

import importlib
import sys

ALL = ("startup", "warm", "hygiene", "loading", "sharing", "suite", "workers", "threads", "scoring")


def main(names: list[str]) -> int:
    broken = 0
    print(f"{'figure':<62} {'promised':>9} {'measured':>9}")
    for name in names or ALL:
        for figure in importlib.import_module(f"tests.benchmarks.{name}").figures():
            print(figure.row(), flush=True)
            broken += not figure.kept
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
