"""What `sway_compare` costs besides the scores of both sides, on SmolLM2 with two adapters of the quickstart's kind."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from examples.quickstart.train import RANK
from examples.smollm2 import smollm2_folder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.run.regression.comparing import comparing
from tests.benchmarks.figures import Figure, medians
from tests.texts import lengths, texts
from tests.tiny import make_adapter

ROUNDS = 3
TEXTS = 200


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        base = smollm2_folder()
        cache = BackendCache(max_size=2)
        stack.callback(cache.shutdown)
        views: list[Any] = []
        for n in (1, 2):
            adapter = make_adapter(Path(name) / f"adapter{n}", base, seed=n, r=RANK, scale=0.02)
            backend = stack.enter_context(cache.lease({"base": base, "adapter": adapter}))
            views.append(stack.enter_context(backend.as_finetuned()))
        # The number makes them all different; it takes two to four tokens.
        asked = [f"{n}. {text}" for n, text in enumerate(texts(views[0].tokenizer, lengths(TEXTS, 18, 56)))]
        none = cast(Any, None)  # both sides are views, so nothing is opened, and nothing recorded is read
        sway_compare = comparing(none, none, records=none, confidence=0.99, drift=0.05, made=lambda compared: None)
        sway_compare(asked[:2], *views)  # what is made and imported once

        def scores() -> None:
            for view in views:
                view.rolling_logprobs(asked)

        # The processor's seconds: the promise is closer than the wall's on a machine that does other things besides.
        seconds = medians(ROUNDS, time.process_time, compared=lambda: sway_compare(asked, *views), scores=scores)
        known = [_Known(view.rolling_logprobs(asked)) for view in views]
        added = medians(ROUNDS, compared=lambda: sway_compare(asked, *cast(Any, known)))["compared"]
        yield Figure(
            "sway_compare / rolling_logprobs of both sides",
            1.02,
            seconds["compared"] / seconds["scores"],
            f"medians of {ROUNDS}, processor time: {seconds['compared']:.2f} s, {seconds['scores']:.2f} s;"
            f" {TEXTS} texts of 20 to 60 tokens; by itself {added * 1e3:.1f} ms",
        )


class _Known:
    """A view that has its answers at hand."""

    def __init__(self, answers: Any) -> None:
        self._answers = answers

    def rolling_logprob(self, text: str) -> Any:
        return self.rolling_logprobs([text])[0]

    def rolling_logprobs(self, texts: list[str]) -> Any:
        return self._answers[: len(texts)]
