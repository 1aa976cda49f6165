"""The length of the tests in this folder, chosen by the environment variable SWAY_FIRE, by default ``ci``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hypothesis import HealthCheck, settings


@dataclass(frozen=True)
class Profile:
    """Examples and steps of the state machines; runs with signals; seeds, threads and seconds of the stress test."""

    model: tuple[int, int]
    threads: tuple[int, int]
    seeds: int
    signals: int
    operations: int = 2_000
    stress_threads: int = 16
    stress_seconds: float = 0.0


PROFILES = {
    "quick": Profile(model=(40, 40), threads=(20, 30), seeds=2, signals=100),
    "ci": Profile(model=(500, 80), threads=(300, 50), seeds=20, signals=1_500),
    "soak": Profile(
        model=(20_000, 100), threads=(3_000, 100), seeds=20, signals=50_000, stress_threads=64, stress_seconds=600.0
    ),
}
PROFILE = PROFILES[os.environ.get("SWAY_FIRE", "ci")]


def machine_settings(size: tuple[int, int]) -> settings:
    examples, steps = size
    return settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
