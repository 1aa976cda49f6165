"""The number of inputs, chosen by the environment variable SWAY_FIRE as in `tests/unit/fire`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tests.unit.backends.hf.zoo import SPECIMENS


@dataclass(frozen=True)
class Profile:
    """The number of inputs of each kind, and the types of their adapters."""

    inputs: dict[str, int]
    adapters: tuple[str, ...]


_FEW = ("LORA", "IA3", "LOKR", "PROMPT_TUNING")
_ALL = tuple(dict.fromkeys(specimen.kind for specimen in SPECIMENS))

PROFILES = {
    "quick": Profile(
        {"adapter_config": 20, "adapter_weights": 20, "base_config": 10, "base_weights": 10, "tokenizer": 10}, ("LORA",)
    ),
    "ci": Profile(
        {"adapter_config": 100, "adapter_weights": 80, "base_config": 30, "base_weights": 40, "tokenizer": 40}, _FEW
    ),
    "soak": Profile(
        {"adapter_config": 2000, "adapter_weights": 400, "base_config": 500, "base_weights": 300, "tokenizer": 500},
        _ALL,
    ),
}
PROFILE = PROFILES[os.environ.get("SWAY_FIRE", "ci")]
SEED = int(os.environ.get("SWAY_FIRE_SEED", "0"))
"""The seed of all inputs."""
