"""The types of answers, and the Protocols' checks of backends."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from pytest_sway.comparison.questions import Questions
from pytest_sway.errors import BackendUseError
from pytest_sway.protocols import (
    Chat,
    DifferentialBackend,
    Inspectable,
    Model,
    NullCalibratedBackend,
    PreflightCheckable,
    RawView,
    RollingLogprob,
    ScalableDifferentialBackend,
    ScoringBackend,
    TokenDist,
    View,
)


def _rolling(*logprobs: float) -> RollingLogprob:
    return RollingLogprob(
        token_ids=np.arange(len(logprobs) + 1, dtype=np.int64),
        logprobs=np.asarray(logprobs, dtype=np.float32),
        num_tokens=len(logprobs) + 1,
        total_logprob=float(sum(logprobs)),
    )


def test_the_mean_is_over_the_tokens_that_were_scored() -> None:
    assert _rolling(-1.0, -2.0, -3.0).mean_logprob == pytest.approx(-2.0)


def test_perplexity_is_the_exponential_of_minus_the_mean() -> None:
    assert _rolling(math.log(0.5), math.log(0.125)).perplexity == pytest.approx(4.0)
    assert _rolling(0.0).perplexity == 1.0


def test_a_text_of_which_nothing_was_scored_has_mean_zero_and_perplexity_one() -> None:
    assert _rolling().mean_logprob == 0.0
    assert _rolling().perplexity == 1.0


def test_answers_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        _rolling(-1.0).num_tokens = 7  # type: ignore[misc]
    dist = TokenDist(np.array([1]), np.array([0.0], dtype=np.float32), vocab_size=1)
    assert dist.tail_logprob is None
    with pytest.raises(FrozenInstanceError):
        dist.vocab_size = 2  # type: ignore[misc]


def test_a_distribution_without_texts_says_so() -> None:
    dist = TokenDist(np.array([1, 0]), np.array([-0.1, -2.0], dtype=np.float32), vocab_size=2)
    with pytest.raises(BackendUseError, match=r"has no texts: .* gives token ids alone\. Decode token_ids with"):
        _ = dist.texts
    assert replace(dist, decode=lambda ids: [f" {i}" for i in ids]).texts == [" 1", " 0"]


def test_a_chat_is_known_by_what_it_says() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    chat = Chat(iter(messages), enable_thinking=False)
    assert chat == Chat(messages, enable_thinking=False) == copy.deepcopy(chat) != Chat(messages)
    assert repr(chat) == "Chat([{'role': 'user', 'content': 'Hello'}], enable_thinking=False)"
    with pytest.raises(FrozenInstanceError):
        chat.messages = ()  # type: ignore[misc]


def test_a_chat_can_be_compared_by_its_answers() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    pairs = [(Chat(messages, enable_thinking=thinks), " Hi.") for thinks in (False, True)]
    assert Questions(pairs).clusters() == [[0], [1]]
    assert Questions(pairs).digests() == Questions(list(pairs)).digests()


class _Text:
    id = "fake"

    def generate(self, prompt: str, **options: Any) -> str:
        return prompt

    def close(self) -> None: ...


class _Scores(_Text):
    def logprob_of(self, prompt: str, completion: str) -> float:
        return 0.0

    def rolling_logprob(self, text: str) -> RollingLogprob:
        return _rolling()

    def next_token_dist(self, prompt: str, *, top_k: int = 256) -> TokenDist:
        raise NotImplementedError


class _Raw(_Scores):
    model = object()
    tokenizer = object()


class _Sides:
    def as_base(self) -> AbstractContextManager[_Scores]:
        return nullcontext(_Scores())

    def as_finetuned(self) -> AbstractContextManager[_Scores]:
        return nullcontext(_Scores())


class _Everything(_Sides):
    def as_scaled_adapter(self, lam: float) -> AbstractContextManager[_Scores]:
        return nullcontext(_Scores())

    def as_null_adapter(self, seed: int, **scales: float) -> AbstractContextManager[_Scores]:
        return nullcontext(_Scores())

    def preflight_finite_check(self) -> tuple[bool, str]:
        return True, ""

    def changes(self) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("made", "protocols"),
    [
        (_Text(), {Model}),
        (_Scores(), {Model, ScoringBackend, View}),
        (_Raw(), {Model, ScoringBackend, View, RawView}),
        (_Sides(), {DifferentialBackend}),
        (
            _Everything(),
            {
                DifferentialBackend,
                ScalableDifferentialBackend,
                NullCalibratedBackend,
                PreflightCheckable,
                Inspectable,
            },
        ),
        (object(), set()),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, set) else "",
)
def test_the_protocols_match_the_backends_abilities(made: object, protocols: set[type]) -> None:
    known = (
        Model,
        ScoringBackend,
        View,
        RawView,
        DifferentialBackend,
        ScalableDifferentialBackend,
        NullCalibratedBackend,
        PreflightCheckable,
        Inspectable,
    )
    assert {protocol for protocol in known if isinstance(made, protocol)} == protocols


def test_they_are_those_of_dlm_sway() -> None:
    model = pytest.importorskip("dlm_sway.core.model", reason="dlm-sway is not installed")
    scoring = pytest.importorskip("dlm_sway.core.scoring")
    assert isinstance(_Scores(), model.Model)
    assert isinstance(_Scores(), scoring.ScoringBackend)
    assert isinstance(_Sides(), scoring.DifferentialBackend)
    assert isinstance(_Everything(), scoring.ScalableDifferentialBackend)
    assert isinstance(_Everything(), scoring.NullCalibratedBackend)
