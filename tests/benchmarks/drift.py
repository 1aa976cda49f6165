"""How far a base and an adapter drift from their recorded scores: ``python -m tests.benchmarks.drift``.

It prints the table of docs/pages/how-to/regression.md, in a quarter of an hour. The quickstart's adapter and its base,
SmolLM2-135M, are scored in a process for each way of computing, and compared with fp32 on one thread.
``--python PATH`` adds another environment's Python, such as one with older libraries. ``--base FOLDER`` names a base
that both can read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from examples.quickstart.train import fingerprint, train
from examples.regression.town import QUESTIONS
from examples.smollm2 import made_once, smollm2_folder
from tests.benchmarks.regression import ORDINARY, TOWN

Scores = dict[str, dict[str, list[float]]]
"""The scores of each side, by the name of its questions."""


class Way(NamedTuple):
    """One way of computing.

    Attributes:
        dtype: The dtype of a spec.
        threads: torch's threads.
        avx2: Whether torch and its libraries use AVX2, although the processor may have AVX-512.
        python: The Python of an environment.
    """

    dtype: str = "fp32"
    threads: int = 1
    avx2: bool = False
    python: str = sys.executable


AVX2: Final = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
RECORDED: Final = Way()
AGAIN: Final = {
    "two threads": Way(threads=2),
    "fp32, AVX2": Way(avx2=True),
    "bf16": Way("bf16"),
    "bf16, AVX2": Way("bf16", avx2=True),
}
SETS: Final[dict[str, list[Any]]] = {
    f"{len(TOWN)} pairs": TOWN,
    f"{len(QUESTIONS)} pairs": TOWN[: len(QUESTIONS)],
    "texts": ORDINARY,
}
"""Pairs score nats an answer, texts nats per token."""
COLUMNS: Final = (
    "drift of the base",
    "shift of the adapter",
    "largest of one answer",
    "variance of the shift if each row's drift is subtracted",
    "correlation",
)


def print_scores(base: str, adapter: str, dtype: str) -> None:
    """Print the scores of both sides as JSON: what a process with its own way of computing does."""
    from pytest_sway.cache.backend_cache import BackendCache
    from pytest_sway.comparison.questions import Questions

    cache, found = BackendCache(max_size=1), Scores()
    lease = cache.lease({"base": base, "adapter": adapter, "device": "cpu", "dtype": dtype})
    with lease as backend, backend.as_base() as plain, backend.as_finetuned() as tuned:
        for side, view in (("base", plain), ("tuned", tuned)):
            found[side] = {name: Questions(asked).scored_by(view, side) for name, asked in SETS.items()}
    cache.shutdown()
    print(json.dumps(found))


def scores(way: Way, base: Path, adapter: Path) -> Scores:
    """Return the scores that a process computes in one way."""
    command = [way.python, "-m", "tests.benchmarks.drift", "--print", str(base), str(adapter), way.dtype]
    env = os.environ | {"OMP_NUM_THREADS": str(way.threads)} | (AVX2 if way.avx2 else {})
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: Scores = json.loads(done.stdout.splitlines()[-1])
    return found


def cells(then: Scores, now: Scores, name: str) -> list[str]:
    """Return the cells of a row of the table: see `COLUMNS`."""
    drift, shift = (np.array(now[side][name]) - np.array(then[side][name]) for side in ("base", "tuned"))
    moved = [f"{drift.mean():+.2g}", f"{shift.mean():+.2g}", f"{max(abs(drift).max(), abs(shift).max()):.1g}"]
    if not (drift.any() and shift.any()):
        return [*moved, "", ""]
    times = (shift - drift).var() / shift.var()
    return [*moved, f"{times:.2g} times", f"{np.corrcoef(drift, shift)[0, 1]:+.2f}"]


def main() -> None:
    """Score both sides in all ways, and print a table for each set of questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="another environment's Python")
    parser.add_argument("--base", type=Path, help="the folder of SmolLM2-135M-Instruct")
    parser.add_argument("--print", nargs=3, metavar=("BASE", "ADAPTER", "DTYPE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.print:
        print_scores(*asked.print)
        return
    made = smollm2_folder()
    adapter = made_once(f"quickstart/{fingerprint(made)}", lambda folder: train(made, folder))
    base = asked.base or made
    ways = AGAIN | ({asked.python: Way(python=asked.python)} if asked.python else {})
    then, found = scores(RECORDED, base, adapter), {name: scores(way, base, adapter) for name, way in ways.items()}
    for name in SETS:
        print(f"\n| scored again with ({name}) | {' | '.join(COLUMNS)} |\n{'| --- ' * (1 + len(COLUMNS))}|")
        for way, now in found.items():
            print(f"| {way} | {' | '.join(cells(then, now, name))} |")


if __name__ == "__main__":
    main()
