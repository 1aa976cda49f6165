"""The power of ``sway_compare`` to detect a worse candidate, beside other tests: ``python -m tests.benchmarks.power``.

It prints the table of docs/pages/how-to/regression.md. All tests get the same scores and the same nominal level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from pytest_sway.comparison.statistics import mean_interval

Scores = NDArray[np.float64]

RUNS: Final = 2_000
PROMPTS: Final = (5, 10, 20, 50, 200)
CONFIDENCE: Final = 0.95
LOSS: Final = 0.5
"""The candidate's mean loss, in standard deviations of the differences."""

DIFFICULTY: Final = 2.0
"""The standard deviation of a side's scores over the prompts, in standard deviations of the differences."""

RESAMPLES: Final = 2_000
"""pytest-torch's default."""

DIFFERENCES: Final[dict[str, Callable[[np.random.Generator, tuple[int, int]], Scores]]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(3, shape) / np.sqrt(3),
    "skewed": lambda rng, shape: (rng.gamma(4.0, size=shape) - 4.0) / 2,
    "very skewed": lambda rng, shape: rng.exponential(size=shape) - 1.0,
}
"""Differences of two equally good sides, of standard deviation 1; in the last two, losses are small and gains large."""


def ours(candidate: Scores, baseline: Scores) -> Scores:
    """Return the upper bound of ``sway_compare``'s interval."""
    return mean_interval(candidate - baseline, CONFIDENCE)[2]


def bootstrap(candidate: Scores, baseline: Scores) -> Scores:
    """Return that of a percentile bootstrap of paired differences: ``pytest_torch.paired_difference`` (1.1.1)."""
    rng = np.random.default_rng(0)
    differences = candidate - baseline
    n = differences.shape[-1]
    bounds = [
        np.quantile(row[rng.integers(0, n, (RESAMPLES, n))].mean(axis=-1), (1 + CONFIDENCE) / 2) for row in differences
    ]
    return np.array(bounds)


def welch(candidate: Scores, baseline: Scores) -> Scores:
    """Return that of Welch's t interval for two samples, which ignores which scores belong to one prompt."""
    n = candidate.shape[-1]
    errors = [side.var(axis=-1, ddof=1) / n for side in (candidate, baseline)]
    error = errors[0] + errors[1]
    freedom = error**2 / sum(each**2 / (n - 1) for each in errors)
    mean = (candidate - baseline).mean(axis=-1)
    return np.asarray(mean + stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(error))


TESTS: Final = {
    "sway_compare": ours,
    "paired percentile bootstrap (pytest-torch)": bootstrap,
    "unpaired (Welch)": welch,
}


def main() -> None:
    """Print how often a worse candidate is detected and, in parentheses, how often an equal one is."""
    print("| differences | test |", " | ".join(f"{n} prompts" for n in PROMPTS), "|")
    print("| --- " * (2 + len(PROMPTS)) + "|")
    for name, draw in DIFFERENCES.items():
        shown: dict[str, list[str]] = {test: [] for test in TESTS}
        for n in PROMPTS:
            rng = np.random.default_rng(n)
            baseline = rng.standard_normal((RUNS, n)) * DIFFICULTY
            candidate = baseline + draw(rng, (RUNS, n))
            for test, high in TESTS.items():
                bound = high(candidate, baseline)  # a loss on every prompt moves the whole interval
                shown[test].append(f"{(bound < LOSS).mean():.0%} ({(bound < 0).mean():.1%})")
        for test, cells in shown.items():
            print(f"| {name} | {test} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
