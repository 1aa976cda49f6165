"""Which damage to an adapter is found, and whether a retrained one passes: ``python -m tests.benchmarks.regression``.

It prints the tables of docs/pages/how-to/regression.md, which takes half an hour. The baseline is the quickstart's
adapter on SmolLM2-135M. Some candidates are copies with noise, in which each number of each LoRA matrix has moved by a
draw from a normal distribution, whose standard deviation is so many percent of that of the matrix. The others are
trained as the baseline was, with another seed.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

from examples.quickstart.train import fingerprint, train
from examples.regression.town import QUESTIONS
from examples.smollm2 import made_once, smollm2_folder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.comparison.comparison import Comparison, compare
from pytest_sway.comparison.questions import Questions

CONFIDENCE: Final = 0.99
NOISE: Final = (0.05, 0.1, 0.2, 0.5)
COPIES: Final = 3
SEEDS: Final = 20
COUNTS: Final = (20, 50, 200)
DRAWS: Final = 100
"""How often so many of the 200 questions are drawn, for each candidate."""

LEADS: Final = (
    "",
    "It is well known. ",
    "I was there last year. ",
    "Here is what the book says. ",
    "You asked about it. ",
    "This is a fact. ",
    "Let me tell you. ",
    "Look at the map. ",
    "My uncle told me. ",
    "Do you know it? ",
)
"""Each stands before each of the example's 20 questions, which makes 200."""

TOWN: Final = [(f"{lead}{prompt}", answer) for lead, (prompt, answer) in product(LEADS, QUESTIONS)]

_SUBJECTS: Final = "The old teacher|My younger sister|A tired doctor|The new neighbour|Our tall guide|The first visitor"
_VERBS: Final = "painted a boat|wrote a letter|sold two chairs|found a key|read the news|cooked a soup|broke a window"
_PLACES: Final = "behind the church|in the early morning|near the station|before the rain came|at the end of the street"
ORDINARY: Final = [
    f"{subject} {verb} {place}."
    for subject, verb, place in random.Random(0).sample(
        list(product(_SUBJECTS.split("|"), _VERBS.split("|"), _PLACES.split("|"))), 200
    )
]
"""Short sentences that have nothing to do with the town."""

Scores = list[float]
SETS: Final[dict[str, list[Any]]] = {"answers about the town": TOWN, "ordinary texts": ORDINARY}


class Scorer:
    """Scores adapters on one loaded base."""

    def __init__(self, base: Path, cache: BackendCache) -> None:
        self._base = base
        self._cache = cache
        self._asked = {name: Questions(asked) for name, asked in SETS.items()}

    def __call__(self, adapter: Path) -> dict[str, Scores]:
        """Return the scores of each set of questions."""
        lease = self._cache.lease({"base": self._base, "adapter": adapter})
        with lease as backend, backend.as_finetuned() as view:
            return {name: asked.scored_by(view, adapter.name) for name, asked in self._asked.items()}


def damaged(adapter: Path, output: Path, noise: float, seed: int) -> Path:
    """Save a copy of an adapter with noise on each of its matrices."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, output)
    drawn = torch.Generator().manual_seed(seed)
    weights = load_file(adapter / "adapter_model.safetensors")
    moved = {
        name: matrix + noise * matrix.std() * torch.randn(matrix.shape, generator=drawn)
        for name, matrix in weights.items()
    }
    save_file(moved, output / "adapter_model.safetensors", metadata={"format": "pt"})
    return output


def retrained(base: Path, seed: int) -> Path:
    """Return an adapter that was trained as the quickstart's, with another seed; the first call trains it."""
    name = f"regression/{fingerprint(base)}/seed-{seed}"
    return made_once(name, lambda folder: train(base, folder, seed=seed))


def comparisons(asked: Sequence[Any], candidate: Scores, baseline: Scores, count: int) -> Iterator[Comparison]:
    """The comparisons of two sides on draws of so many of the questions; one where all of them are drawn."""
    for draw in range(DRAWS if count < len(asked) else 1):
        at = random.Random(draw).sample(range(len(asked)), count)
        sides = (("candidate", [candidate[n] for n in at]), ("baseline", [baseline[n] for n in at]))
        yield compare(Questions([asked[n] for n in at]), *sides, confidence=CONFIDENCE)


def shares(
    name: str, candidates: Sequence[Scores], baseline: Scores, holds: Callable[[Comparison], bool]
) -> Iterator[str]:
    """For each number of questions, in how many of the comparisons something holds."""
    for count in COUNTS:
        held = [holds(each) for scores in candidates for each in comparisons(SETS[name], scores, baseline, count)]
        yield f"{sum(held)} of {len(held)}" if count == len(SETS[name]) else f"{sum(held) / len(held):.0%}"


def print_table(rows: dict[str, list[dict[str, Scores]]], baseline: dict[str, Scores]) -> None:
    """Print how often candidates are shown to be worse, and to lose little."""
    counts = " | ".join(f"{what}: {n}" for what in ("`high < 0`", "`low > -0.1`", "`low > -0.5`") for n in COUNTS)
    for name, base_scores in baseline.items():
        print(f"\n| candidate, {name} | mean | {counts} |")
        print("| --- " * (2 + 3 * len(COUNTS)) + "|")
        for candidate, found in rows.items():
            scores = [each[name] for each in found]
            means = [sum(each) / len(each) - sum(base_scores) / len(base_scores) for each in scores]
            holds: tuple[Callable[[Comparison], bool], ...] = (
                lambda each: each.high < 0,
                lambda each: each.low > -0.1,
                lambda each: each.low > -0.5,
            )
            cells = [cell for check in holds for cell in shares(name, scores, base_scores, check)]
            print(f"| {candidate} | {min(means):+.2g} to {max(means):+.2g} | {' | '.join(cells)} |", flush=True)


def print_retrained(found: Sequence[dict[str, Scores]], baseline: dict[str, Scores]) -> None:
    """Print for how many seeds each assertion passes, with the example's questions and with all."""
    print("\n| questions | mean | `high >= 0` | `low > -0.5` | `low > -1` | `low > -2` |")
    print("| --- " * 6 + "|")
    town, ordinary = SETS
    for name, count in ((town, len(QUESTIONS)), (town, len(TOWN)), (ordinary, len(ORDINARY))):
        asked = Questions(SETS[name][:count])
        made = [
            compare(asked, ("", each[name][:count]), ("", baseline[name][:count]), confidence=CONFIDENCE)
            for each in found
        ]
        means = sorted(each.mean for each in made)
        passed = [sum(each.high >= 0 for each in made), *(sum(each.low > -m for each in made) for m in (0.5, 1, 2))]
        cells = " | ".join(f"{number} of {len(made)}" for number in passed)
        print(f"| {count} {name} | {means[0]:+.2f} to {means[-1]:+.2f} | {cells} |")


def main() -> None:
    """Train and score what is not there yet, and print the tables."""
    base = smollm2_folder()
    adapter = made_once(f"quickstart/{fingerprint(base)}", lambda folder: train(base, folder))
    rows: dict[str, list[dict[str, Scores]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = BackendCache(max_size=1)
        try:
            score = Scorer(base, cache)
            baseline = score(adapter)
            for noise in NOISE:
                copies = [damaged(adapter, Path(folder) / f"{noise}-{n}", noise, n) for n in range(COPIES)]
                rows[f"{noise:.0%} noise"] = [score(copy) for copy in copies]
                print(f"{noise:.0%} noise is scored", file=sys.stderr, flush=True)
            found = []
            for seed in range(1, SEEDS + 1):
                found.append(score(retrained(base, seed)))
                print(f"seed {seed} is scored", file=sys.stderr, flush=True)
        finally:
            cache.shutdown()
    print_table(rows, baseline)
    print_retrained(found, baseline)


if __name__ == "__main__":
    main()
