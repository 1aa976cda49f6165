"""Scores equal lm-evaluation-harness's, on SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from tests.neighbours import harness
from tests.texts import lengths, texts


@pytest.fixture(scope="module")
def backend(base: Path, adapters: list[Path]) -> Any:
    cache = BackendCache(max_size=1)
    with cache.lease({"base": base, "adapter": adapters[0]}) as backend:
        yield backend
    cache.shutdown()


@pytest.fixture
def view(backend: Any) -> Any:
    with backend.as_finetuned() as view:
        yield view


@pytest.fixture
def lm(view: Any) -> Any:
    return harness.hflm(view.model, view.tokenizer)


def test_the_base_agrees_too(backend: Any) -> None:
    with backend.as_base() as view:
        lm = harness.hflm(view.model, view.tokenizer)
        scored = texts(view.tokenizer, [5, 17, 40])
        expected = harness.rolling(lm, scored)
        assert [r.total_logprob for r in view.rolling_logprobs(scored)] == pytest.approx(expected, rel=1e-4)


def test_rolling_logprobs_agree_on_texts_of_5_to_400_tokens(view: Any, lm: Any) -> None:
    scored = texts(view.tokenizer, lengths(24, 5, 400))
    expected = harness.rolling(lm, scored)
    assert [r.total_logprob for r in view.rolling_logprobs(scored)] == pytest.approx(expected, rel=1e-4)
    assert [view.rolling_logprob(text).total_logprob for text in scored[::4]] == pytest.approx(expected[::4], rel=1e-4)


def test_logprobs_of_pairs_agree_on_texts_of_5_to_400_tokens(view: Any, lm: Any) -> None:
    scored = texts(view.tokenizer, lengths(24, 5, 400), seed=1)
    pairs = [
        (text[: len(text) * (n % 8 + 1) // 10], text[len(text) * (n % 8 + 1) // 10 :]) for n, text in enumerate(scored)
    ]
    expected = harness.of_pairs(lm, pairs)
    assert view.logprobs_of(pairs) == pytest.approx(expected, rel=1e-4)
    assert [view.logprob_of(*pair) for pair in pairs[::4]] == pytest.approx(expected[::4], rel=1e-4)


@pytest.mark.parametrize(
    "pair",
    [
        ("The capital of France is", " Paris"),
        ("The capital of France is ", "Paris"),
        ("The capital of France is \n\t ", "Paris"),
        ("", "Paris is the capital of France."),
        ("Question: what is 2+2?\nAnswer:", " 4"),
        ("The fox counted the st", "ars again and again"),
        ("<|im_start|>user\nHello<|im_end|>\n", "<|im_start|>assistant\nHi"),
    ],
)
def test_pairs_are_cut_into_tokens_as_there(view: Any, lm: Any, pair: tuple[str, str]) -> None:
    assert view.logprob_of(*pair) == pytest.approx(harness.of_pairs(lm, [pair])[0], rel=1e-4)


def test_texts_longer_than_the_model_roll_through_the_same_windows(
    cache: BackendCache, base: Path, tmp_path: Path
) -> None:
    for file in base.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    with cache.lease({"base": tmp_path}) as backend, backend.as_base() as view:
        scored = texts(view.tokenizer, [255, 256, 257, 700])
        expected = harness.rolling(harness.hflm(view.model, view.tokenizer), scored)
        assert [r.total_logprob for r in view.rolling_logprobs(scored)] == pytest.approx(expected, rel=1e-4)


def test_completions_of_one_prompt_agree(view: Any, lm: Any) -> None:
    prompts = texts(view.tokenizer, lengths(8, 60, 140), seed=2)
    completions = [" yes", " no, and nobody knows why", " perhaps it is so.", "\n"]
    pairs = [(prompt, completion) for prompt in prompts for completion in completions]
    assert view.logprobs_of(pairs) == pytest.approx(harness.of_pairs(lm, pairs), rel=1e-4)
