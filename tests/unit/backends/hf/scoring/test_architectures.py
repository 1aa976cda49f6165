"""Families that differ in what scoring could get wrong: positions, masks, caches, and the steps after the body."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.backends.hf.generation import generate
from tests.tiny import WORDS, make_adapter
from tests.unit.backends.hf.families import families, make_family
from tests.unit.backends.hf.reference import logits
from tests.unit.backends.hf.zoo import TRANSFORMERS_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FAMILIES = (
    "gpt2",  # learned positions
    "opt",  # positions computed from the mask
    "bloom",  # ALiBi
    "mistral",  # a sliding window
    "gemma2",  # a soft cap after the head
    "cohere",  # logits scaled up
    "granite",  # logits scaled down
    "mixtral",  # experts
    "lfm2",  # a cache of two kinds
    "mamba",  # no attention
    # A recurrent state, which padding may change, or which is made for one text at a time.
    "minimax",
    "rwkv",
    "mamba2",
    "falcon_mamba",
    # On transformers 4 its layers keep the state of the last pass, and fail on a batch of another size.
    *(("recurrent_gemma",) if TRANSFORMERS_VERSION >= (5, 0) else ()),
    "jamba",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "qwen3_next",
    "olmo_hybrid",
)
TEXTS = [" ".join(WORDS[i : i + n]) for i, n in enumerate([3, 40, 17, 5, 29, 60, 11])]
CHOICES = [(TEXTS[5], " " + " ".join(WORDS[i : i + 1 + i % 3])) for i in range(4)]


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name in families()])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def view(build: Any, family: Path) -> Iterator[Any]:
    with build(family).as_base() as view:
        yield view


def _reference(view: Any, text: str) -> Any:
    """Return the log-probabilities of all tokens of ``text`` but the first, from one pass of the raw model."""
    import torch

    ids = view.tokenizer(text)["input_ids"]
    logprobs: Any = torch.log_softmax(logits(view.model, view.tokenizer, text)[0, :-1].float(), -1)
    return logprobs[torch.arange(len(ids) - 1), ids[1:]].numpy()


def test_texts_alone_and_together_score_as_in_a_plain_pass(view: Any) -> None:
    for text, together in zip(TEXTS, view.rolling_logprobs(TEXTS), strict=True):
        expected = _reference(view, f"<s> {text}")
        np.testing.assert_allclose(together.logprobs, expected, atol=2e-4)
        np.testing.assert_allclose(view.rolling_logprob(text).logprobs, expected, atol=2e-4)


def test_completions_of_one_prompt_score_as_in_a_plain_pass(view: Any) -> None:
    expected = []
    for prompt, completion in CHOICES:
        start = len(view.tokenizer(prompt)["input_ids"])
        expected.append(float(_reference(view, prompt + completion)[start - 1 :].sum()))
    assert view.logprobs_of(CHOICES) == pytest.approx(expected, abs=2e-4)
    assert [view.logprob_of(*pair) for pair in CHOICES] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_go_on_together_as_they_do_alone(view: Any, temperature: float) -> None:
    settings = {"max_new_tokens": 6, "temperature": temperature}
    assert view.generate_many(TEXTS, **settings) == [view.generate(text, **settings) for text in TEXTS]


def test_generated_text_follows_the_most_probable_scores(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "decoded_texts", lambda _, found, *__: [str(list(ids)) for ids in found])
    text, expected = TEXTS[2], list[int]()
    while len(expected) < 6 and view.tokenizer.eos_token_id not in expected:
        last = logits(view.model, view.tokenizer, " ".join([text, *view.tokenizer.convert_ids_to_tokens(expected)]))
        expected.append(int(last[0, -1].argmax()))
    assert view.generate(text, max_new_tokens=6) == str(expected)


def test_a_model_that_only_runs_as_a_whole_gives_the_same_numbers(
    build: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(base, adapter).as_finetuned() as view:
        expected = view.logprobs_of(CHOICES), view.rolling_logprobs(TEXTS), view.next_token_dists(TEXTS)
    monkeypatch.setattr("pytest_sway.backends.hf.scoring.forward.split_model", lambda model, trials: None)
    with build(base, adapter, allow_pickle=True).as_finetuned() as view:  # another spec, to load it again
        found = view.logprobs_of(CHOICES), view.rolling_logprobs(TEXTS), view.next_token_dists(TEXTS)
    assert found[0] == pytest.approx(expected[0], abs=2e-4)
    for a, b in zip(found[1] + found[2], expected[1] + expected[2], strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-4)


@pytest.mark.parametrize("argument", ["logits_to_keep", None])
def test_a_model_that_makes_all_logits_gives_the_same_numbers(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch, argument: str | None
) -> None:
    with build(base).as_base() as view:
        expected = view.logprob_of(*CHOICES[1])
    monkeypatch.setattr("pytest_sway.backends.hf.scoring.forward.split_model", lambda model, trials: None)
    monkeypatch.setattr("pytest_sway.backends.hf.scoring.forward._last_logits_argument", lambda model: argument)
    with build(base, allow_pickle=True).as_base() as view:
        assert view.logprob_of(*CHOICES[1]) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_on_the_head_takes_part(build: Any, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, base, targets=("q_proj", "lm_head"))
    with build(base, adapter).as_finetuned() as view:
        for text, rolling in zip(TEXTS, view.rolling_logprobs(TEXTS), strict=True):
            np.testing.assert_allclose(rolling.logprobs, _reference(view, f"<s> {text}"), atol=2e-4)
