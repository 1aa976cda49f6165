"""What may be asked of a view is the same for a dummy and for a server; kind ``hf`` has tests of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pytest_sway.backends.dummy.backend import DummyBackend
from pytest_sway.errors import ScoringError

Ask = Callable[[Any], Any]


@pytest.fixture(params=["dummy", "api"])
def view(request: pytest.FixtureRequest) -> Iterator[Any]:
    backend: Any = DummyBackend() if request.param == "dummy" else request.getfixturevalue("build")()
    with backend.as_base() as opened:
        yield opened


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda view: view.next_token_dists("the sun"), "expected a list of prompts, and 'the sun' is none"),
        (lambda view: view.rolling_logprobs("the sun"), "expected a list of texts, and 'the sun' is none"),
        (lambda view: view.generate_many("the sun", max_new_tokens=1), "expected a list of prompts"),
        (lambda view: view.logprobs_of(("a", "b")), "a pair is a prompt and a completion, and 'a' is none"),
        (lambda view: view.rolling_logprob(None), "expected a text to score, and None is none"),
        (lambda view: view.generate("a", max_new_tokens=0), "max_new_tokens must be at least 1, not 0"),
        (lambda view: view.generate("a", max_new_tokens=1, temperature=float("nan")), "temperature must be 0 or more"),
        (lambda view: view.generate_many(["a"], max_new_tokens=1, top_p=2.0), "top_p must be over 0 and at most 1"),
        (lambda view: view.generate_many(["a", "b"], max_new_tokens=1, seed=[1]), "there are 2 prompts and 1 seeds"),
    ],
)
def test_a_question_without_meaning_is_refused(view: Any, ask: Ask, sentence: str) -> None:
    with pytest.raises(ScoringError, match=sentence):
        ask(view)
