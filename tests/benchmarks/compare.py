"""The cost of `sway_compare` beyond scoring both sides, on SmolLM2 with two adapters like the quickstart's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, cast

from examples.quickstart.train import RANK
from examples.smollm2 import smollm2_folder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.run.regression.comparing import comparing
from tests.benchmarks.figures import Figure
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
        # The number makes each text different; it takes two to four tokens.
        asked = [f"{n}. {text}" for n, text in enumerate(texts(views[0].tokenizer, lengths(TEXTS, 18, 56)))]
        nothing = cast(Any, None)  # unused: both sides are views
        sway_compare = comparing(nothing, nothing, records=nothing, confidence=0.99, drift=0.05, made=lambda _: None)
        sway_compare(asked[:2], *views)  # warm up: imports and caches

        shares, seconds = [], []
        for _ in range(ROUNDS):
            timed = [_Timed(view) for view in views]
            started = time.process_time()
            sway_compare(asked, *cast(Any, timed))
            seconds.append(time.process_time() - started)
            scored = sum(view.seconds for view in timed)
            if [view.asked for view in timed] != [[asked], [asked]]:
                raise AssertionError("sway_compare does not score each side by one call of rolling_logprobs")
            shares.append(seconds[-1] / scored)
        yield Figure(
            "sway_compare / rolling_logprobs of both sides",
            1.02,
            median(shares),
            f"median of {ROUNDS}, processor time of the comparison and of the scoring in it; {median(seconds):.2f} s;"
            f" {TEXTS} texts of 20 to 60 tokens",
        )


class _Timed:
    """A view whose scoring is timed: two runs of the scoring differ by more than the promised bound.

    Attributes:
        seconds: The processor time of its scoring.
        asked: The texts of each call.
    """

    def __init__(self, view: Any) -> None:
        self._view = view
        self.seconds = 0.0
        self.asked: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)

    def rolling_logprobs(self, texts: list[str]) -> Any:
        self.asked.append(list(texts))
        started = time.process_time()
        try:
            return self._view.rolling_logprobs(texts)
        finally:
            self.seconds += time.process_time() - started
