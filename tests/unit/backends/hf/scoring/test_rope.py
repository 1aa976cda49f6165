"""Rotary embeddings that depend on the longest text in a pass: each text scores as if alone on a fresh model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.backends.hf.scoring.alone import RopeRegimes
from tests.tiny import WORDS, make_tokenizer, quiet, save_adapter
from tests.unit.backends.hf.reference import fresh

if TYPE_CHECKING:
    from pathlib import Path

_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 16,
    "factor": 16.0,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
_FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"rope_parameters": _LONG, "original_max_position_embeddings": 16, "max_position_embeddings": 256},
    "llama": {"rope_parameters": _LONG, "max_position_embeddings": 256},
    "granite": {"rope_parameters": _LONG, "max_position_embeddings": 256},
    "mistral": {"rope_parameters": _DYNAMIC, "max_position_embeddings": 16},
}
TEXTS = [" ".join(WORDS[i : i + n]) for i, n in enumerate([3, 40, 14, 15, 16, 17, 29])]


@pytest.fixture(scope="module", params=_FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": make_tokenizer(folder), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    fields = {**sizes, **tokens, "num_key_value_heads": 2, "initializer_range": 0.2, **_FAMILIES[request.param]}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class: Any = AutoModelForCausalLM
        model_class.from_config(AutoConfig.for_model(request.param, **fields)).save_pretrained(folder)
    return folder


def _alone(folder: Path, text: str) -> Any:
    """Return the log-probabilities of a text's tokens from a model that has computed nothing else."""
    import torch

    model, tokenizer = fresh(folder)
    ids = tokenizer(f"<s> {text}")["input_ids"][:-1], tokenizer(f"<s> {text}")["input_ids"][1:]
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([ids[0]])).logits[0].log_softmax(-1)
    return logprobs[torch.arange(len(ids[1])), ids[1]].numpy()


def test_texts_of_all_lengths_in_one_call_score_as_each_does_alone(build: Any, family: Path) -> None:
    readable = [text for text in TEXTS if len(text.split()) <= fresh(family)[0].config.max_position_embeddings]
    with build(family).as_base() as view:
        for _ in range(2):
            for text, together in zip(readable, view.rolling_logprobs(readable), strict=True):
                np.testing.assert_allclose(together.logprobs, _alone(family, text), atol=2e-4)


def test_a_long_text_leaves_no_trace_in_the_next_short_one(build: Any, family: Path) -> None:
    with build(family).as_base() as view:
        before = view.rolling_logprob(TEXTS[2]).logprobs.tolist()
        view.rolling_logprob(TEXTS[1])
        view.rolling_logprobs(TEXTS)
        assert view.rolling_logprob(TEXTS[2]).logprobs.tolist() == before


def test_prompts_of_all_lengths_go_on_together_as_they_do_alone(build: Any, family: Path) -> None:
    prompts = [text for text in TEXTS if len(text.split()) <= 14] if "mistral" in family.name else TEXTS
    with build(family).as_base() as view:
        alone = [view.generate(prompt, max_new_tokens=2) for prompt in prompts]
        assert view.generate_many(prompts, max_new_tokens=2) == alone
        assert [dist.token_ids.tolist() for dist in view.next_token_dists(prompts, top_k=3)] == [
            view.next_token_dist(prompt, top_k=3).token_ids.tolist() for prompt in prompts
        ]


def test_the_model_that_scores_long_texts_is_no_change(build: Any, family: Path) -> None:
    backend = build(family)
    with backend.as_base() as view:
        view.rolling_logprobs(TEXTS)
    assert backend.changes() == []


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_positions_too(build: Any, family: Path, tmp_path: Path, kind: str) -> None:
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with quiet():
        adapter = save_adapter(tmp_path / "adapter", family, config)
    texts = [" ".join(WORDS[i : i + n]) for i, n in enumerate([4, 9, 10, 3])]
    alone = []
    for text in texts:
        with build(family, adapter).as_finetuned() as view:  # each text on a fresh tree
            model = view.model
            ids = view.tokenizer(f"<s> {text}", return_tensors="pt")["input_ids"]
            with quiet():
                logits = model(input_ids=ids[:, :-1]).logits[0, -ids.shape[1] + 1 :].detach().log_softmax(-1)
            alone.append(logits.gather(1, ids[0, 1:, None])[:, 0].numpy())
    with build(family, adapter).as_finetuned() as view:
        for _ in range(2):
            for expected, found in zip(alone, view.rolling_logprobs(texts), strict=True):
                np.testing.assert_allclose(found.logprobs, expected, atol=2e-4)


def test_a_text_that_grows_beyond_a_change_of_rope_is_generated_as_it_is_scored(build: Any, family: Path) -> None:
    with build(family).as_base() as view:
        prompt, steps = " ".join(WORDS[5:15]), 6
        text, new = prompt, list[str]()
        if "mistral" in family.name:  # its context has 16 tokens
            text, steps = " ".join(WORDS[5:13]), 4
            prompt = text
        for _ in range(steps):
            token = view.tokenizer.convert_ids_to_tokens(int(view.next_token_dist(text, top_k=1).token_ids[0]))
            text = f"{text} {token}"
            new.append(token)
        assert view.generate(prompt, max_new_tokens=steps).split() == [word for word in new if word[0] != "<"]


def test_a_model_that_names_no_length_and_whose_rope_needs_none_is_one_for_all() -> None:
    config = SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    config.get_text_config = lambda: config
    assert RopeRegimes(config).one_for_all
