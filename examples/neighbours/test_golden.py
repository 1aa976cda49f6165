"""pytest-regressions: numbers that must not change, in a file beside the test; ``--force-regen`` rewrites it."""

from __future__ import annotations

from typing import Any

import pytest

TEXTS = [
    "The capital of France is Paris.",
    "Water boils at a temperature of one hundred degrees Celsius.",
    "The mayor of Quillmere is Odalys Brandt.",
]


def test_the_base_scores_as_ever(sway_backend: Any, spec: Any, num_regression: Any) -> None:
    with sway_backend({"base": spec["base"]}).as_base() as base:
        scores = [rolling.total_logprob for rolling in base.rolling_logprobs(TEXTS)]
    num_regression.check({"total_logprob": scores}, default_tolerance={"atol": 1e-2, "rtol": 1e-4})


@pytest.mark.timeout(300)
@pytest.mark.flaky(reruns=1)
def test_what_was_taught_stays_taught(sway_backend: Any, spec: Any) -> None:
    backend = sway_backend(spec)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.rolling_logprob(TEXTS[2]).total_logprob > base.rolling_logprob(TEXTS[2]).total_logprob + 5


@pytest.mark.asyncio
async def test_a_coroutine_scores_too(sway_backend: Any, spec: Any) -> None:
    import asyncio

    with sway_backend(spec).as_finetuned() as tuned:
        alone = tuned.rolling_logprob(TEXTS[0]).total_logprob
        together = await asyncio.gather(*(asyncio.to_thread(tuned.rolling_logprob, text) for text in TEXTS))
    assert together[0].total_logprob == pytest.approx(alone, abs=1e-3)
