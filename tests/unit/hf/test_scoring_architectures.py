"""Families of models that differ where scoring could go wrong: positions, masks, caches, what follows the body."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.backends.hf import generation
from tests.tiny import WORDS, make_adapter, make_tokenizer, quiet
from tests.unit.hf.reference import logits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
_LLAMA = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
_LINEAR = "linear_attention"
_EVERY_SECOND = dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2) | {"attn_layer_offset": 1}
_MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_DELTA = {
    "layer_types": [_LINEAR, "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},  # learned positions
    "opt": {"ffn_dim": 64, "max_position_embeddings": 256, "init_std": 0.2, **_SMALL},  # positions out of the mask
    "bloom": {**_SMALL},  # ALiBi
    "mistral": {**_LLAMA, "sliding_window": 8},
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 3.0},
    "cohere": {**_LLAMA, "logit_scale": 0.3},
    "granite": {**_LLAMA, "logits_scaling": 3.0},
    "mixtral": {**_LLAMA, "num_local_experts": 4},
    "lfm2": {**_LLAMA, "layer_types": ["conv", "full_attention"]},  # a cache of two kinds
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2},  # no attention
    # Models with a recurrent state, which may take in padding, or be made for one text at a time.
    "minimax": {**_LLAMA, "num_local_experts": 4, "block_size": 16, "layer_types": [_LINEAR, "full_attention"]},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64},
    "mamba2": {**_SMALL, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2},
    "recurrent_gemma": {**_SMALL, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "head_dim": 8},
    "jamba": {**_LLAMA, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, **_EVERY_SECOND},
    "bamba": {**_LLAMA, **_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_LLAMA, **_MAMBA2, "mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": {**_LLAMA, **_MAMBA2, "num_local_experts": 4, "layer_types": ["mamba", "attention"]},
    "qwen3_next": {**_LLAMA, **_DELTA, **_EXPERTS, "head_dim": 8},
    "olmo_hybrid": {**_LLAMA, **_DELTA},
}
_INSTALLED = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
TEXTS = [" ".join(WORDS[i : i + n]) for i, n in enumerate([3, 40, 17, 5, 29, 60, 11])]
CHOICES = [(TEXTS[5], " " + " ".join(WORDS[i : i + 1 + i % 3])) for i in range(4)]


@pytest.fixture(scope="module", params=[name for name in _FAMILIES if name in _INSTALLED])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    tokens = {"vocab_size": make_tokenizer(folder), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(request.param, **tokens, **_FAMILIES[request.param])
        model_class: Any = AutoModelForCausalLM
        model_class.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def view(build: Any, family: Path) -> Iterator[Any]:
    with build(family).as_base() as view:
        yield view


def _reference(view: Any, text: str) -> Any:
    """Log-probabilities of all tokens of ``text`` but the first, out of one pass of the raw model."""
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


def test_a_text_goes_on_with_what_scores_say_is_most_probable(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_decoded", lambda _, found: [str(list(ids)) for ids in found])
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
    monkeypatch.setattr("pytest_sway.backends.hf.forward.split_model", lambda model, trials: None)
    with build(base, adapter, allow_pickle=True).as_finetuned() as view:  # another spec, so that it is loaded anew
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
    monkeypatch.setattr("pytest_sway.backends.hf.forward.split_model", lambda model, trials: None)
    monkeypatch.setattr("pytest_sway.backends.hf.forward._last_logits_argument", lambda model: argument)
    with build(base, allow_pickle=True).as_base() as view:
        assert view.logprob_of(*CHOICES[1]) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_on_the_head_takes_part(build: Any, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, base, targets=("q_proj", "lm_head"))
    with build(base, adapter).as_finetuned() as view:
        for text, rolling in zip(TEXTS, view.rolling_logprobs(TEXTS), strict=True):
            np.testing.assert_allclose(rolling.logprobs, _reference(view, f"<s> {text}"), atol=2e-4)
