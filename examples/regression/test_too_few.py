"""The same question as in test_regression.py, put to three prompts: too few to tell."""

from __future__ import annotations

import pytest

from examples.regression.town import QUESTIONS
from pytest_sway import SwayCompare


@pytest.mark.sway_spec("candidate", "baseline")
def test_it_still_knows_the_town(sway_compare: SwayCompare) -> None:
    assert sway_compare(QUESTIONS[1:4], "candidate", "baseline", name="three questions").low > -1.0
