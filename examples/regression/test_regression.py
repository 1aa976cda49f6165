"""May the candidate replace the baseline? `--sway-set candidate.adapter=runs/v4` says which one it is."""

from __future__ import annotations

import pytest

from examples.regression.town import QUESTIONS
from pytest_sway import SwayBackend, SwayCompare
from pytest_sway.scores import js_from

ELSEWHERE = [
    "The capital of France is",
    "The mayor of London is",
    "Water freezes at a temperature of",
    "Photosynthesis is the process by which",
    "Once upon a time there was a",
    "def add(a, b):\n    return",
]


@pytest.mark.sway_spec("candidate", "baseline")
def test_it_still_knows_the_town(sway_compare: SwayCompare) -> None:
    assert sway_compare(QUESTIONS, "candidate", "baseline", name="the town").low > -1.0


@pytest.mark.sway_spec("candidate", "baseline")
def test_it_left_the_rest_alone(sway_backend: SwayBackend, sway_compare: SwayCompare) -> None:
    with sway_backend("candidate").as_base() as base:
        moved = sway_compare(ELSEWHERE, "candidate", "baseline", score=js_from(base), name="elsewhere")
    assert moved.low > -0.1
