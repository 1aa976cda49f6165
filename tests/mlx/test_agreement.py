"""The same spec on both kinds gives the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pytest_sway.backends.mlx.model.engine import _log_normaliser
from tests.mlx.native import LLAMA3
from tests.tiny import TEXT, make_adapter, make_base, set_template

PAIRS = [("the sun rises in the", " east and sets in the west ."), ("", "the cat"), ("the cat sat ", "on the mat .")]
PROMPTS = ["the sun rises in the", "paris", ""]
CLOSE = 1e-3

ADAPTERS: dict[str, dict[str, Any]] = {
    "two targets": {},
    "all linear layers": {"targets": "all-linear"},
    "the output layer": {"targets": ("lm_head", "q_proj")},
    "an untied embedding": {"targets": ("embed_tokens", "v_proj")},
    "rank-stabilised": {"use_rslora": True},
    "patterns of ranks and alphas": {
        "targets": ("q_proj", "v_proj", "down_proj"),
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8},
        "alpha_pattern": {r"0\.self_attn\.v_proj": 3, "q_proj": 5},
    },
    "rank-stabilised patterns": {"rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 4}, "use_rslora": True},
    "one layer of two": {"layers_to_transform": [1]},
    "trained with dropout": {"lora_dropout": 0.5},
    "DoRA": {"use_dora": True, "targets": ("q_proj", "v_proj", "gate_proj")},
}


def compare(ours: Any, theirs: Any, pairs: list[tuple[str, str]], prompts: list[str]) -> None:
    """Ask two backends the same on both sides, and compare the answers."""
    for side in ("as_base", "as_finetuned"):
        with getattr(ours, side)() as our_view, getattr(theirs, side)() as their_view:
            assert our_view.logprobs_of(pairs) == pytest.approx(their_view.logprobs_of(pairs), abs=CLOSE)
            for prefix in (True, False):
                texts = [prompt + completion for prompt, completion in pairs]
                for our_text, their_text in zip(
                    our_view.rolling_logprobs(texts, prefix=prefix),
                    their_view.rolling_logprobs(texts, prefix=prefix),
                    strict=True,
                ):
                    assert np.array_equal(our_text.token_ids, their_text.token_ids)
                    assert np.allclose(our_text.logprobs, their_text.logprobs, atol=CLOSE)
                    assert our_text.total_logprob == pytest.approx(their_text.total_logprob, abs=CLOSE)
            for our_dist, their_dist in zip(
                our_view.next_token_dists(prompts, top_k=16),
                their_view.next_token_dists(prompts, top_k=16),
                strict=True,
            ):
                assert np.allclose(our_dist.logprobs, their_dist.logprobs, atol=CLOSE)
                assert our_dist.vocab_size == their_dist.vocab_size
                our_tail, their_tail = our_dist.tail_logprob, their_dist.tail_logprob
                assert our_tail is not None
                assert their_tail is not None
                # Compared as masses, since a small tail has few significant digits, and its log would differ much
                assert np.exp(our_tail) == pytest.approx(np.exp(their_tail), abs=CLOSE)
            text = their_view.generate(prompts[0], max_new_tokens=6)
            for settings in ({}, {"repetition_penalty": 1.4}, {"stop": text[len(text) // 2 :][:3] or "nothing"}):
                texts = our_view.generate_many(prompts, max_new_tokens=6, **settings)
                assert texts == their_view.generate_many(prompts, max_new_tokens=6, **settings)


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_of_peft_gives_what_the_hf_backend_gives(
    build: Callable[..., Any], base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    ours, theirs = build(base, adapter), build(base, adapter, kind="hf")
    compare(ours, theirs, PAIRS, PROMPTS)
    with theirs.as_base() as plain, theirs.as_finetuned() as tuned:  # the adapter must have an effect
        assert abs(plain.logprob_of(*PAIRS[0]) - tuned.logprob_of(*PAIRS[0])) > 100 * CLOSE


def test_a_base_with_tied_embeddings_gives_what_the_hf_backend_gives(build: Callable[..., Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base)
    compare(build(base, adapter), build(base, adapter, kind="hf"), PAIRS, PROMPTS)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 70_000.0},
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        LLAMA3,
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_are_those_of_the_configuration_of_transformers_5(
    build: Callable[..., Any], tmp_path: Path, rope: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", rope_parameters=rope)
    adapter = make_adapter(tmp_path / "adapter", base)
    compare(build(base, adapter), build(base, adapter, kind="hf"), [(TEXT, TEXT)], [TEXT * 3])


def test_a_text_longer_than_the_model_reads_is_cut_as_the_hf_backend_cuts_it(
    build: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    short = make_base(tmp_path / "short", max_position_embeddings=8)
    ours, theirs = build(short), build(short, kind="hf")
    with ours.as_base() as our_view, theirs.as_base() as their_view:
        our_text, their_text = our_view.rolling_logprob(TEXT * 3), their_view.rolling_logprob(TEXT * 3)
        assert np.allclose(our_text.logprobs, their_text.logprobs, atol=CLOSE)
        with pytest.warns(match="too long: the model reads at most 8 tokens"):
            ours_cut = our_view.logprob_of(TEXT, " the cat")
        with pytest.warns(match="too long: the model reads at most 8 tokens"):
            theirs_cut = their_view.logprob_of(TEXT, " the cat")
        assert ours_cut == pytest.approx(theirs_cut, abs=CLOSE)


def test_what_a_tokenizer_puts_behind_a_text_is_not_scored(
    build: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    ending = Path(shutil.copytree(base, tmp_path / "ending"))
    path = ending / "tokenizer.json"
    parts = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    special = {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}
    processor = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    with build(ending).as_base() as view, build(base).as_base() as expected:
        assert view.tokenizer.encode("the")[-1] == 2
        assert view.logprobs_of(PAIRS) == expected.logprobs_of(PAIRS)
        assert view.rolling_logprob(TEXT).total_logprob == expected.rolling_logprob(TEXT).total_logprob
        assert view.generate("the sun", max_new_tokens=4) == expected.generate("the sun", max_new_tokens=4)


def test_messages_are_the_prompt_that_the_hf_backend_makes_of_them(
    build: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    talking = set_template(
        shutil.copytree(base, tmp_path / "talking"),
        "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}"
        "{% if add_generation_prompt %}she said :{% endif %}",
    )
    asked = [{"role": "user", "content": "the sun"}]
    begun = [*asked, {"role": "assistant", "content": "rises in"}]
    ours, theirs = build(talking), build(talking, kind="hf")
    with ours.as_base() as our_view, theirs.as_base() as their_view:
        assert our_view.render(asked) == "user : the sun . she said :"
        assert our_view.render(begun) == "user : the sun . assistant : rises in"
        pairs: Any = [(asked, " rises"), (begun, " the east")]
        assert our_view.logprobs_of(pairs) == pytest.approx(their_view.logprobs_of(pairs), abs=CLOSE)
        assert our_view.generate(begun, max_new_tokens=4) == their_view.generate(begun, max_new_tokens=4)


def test_a_long_text_is_scored_in_chunks_as_in_one(
    build: Callable[..., Any], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(base).as_base() as view:
        whole, prompted = view.rolling_logprob(TEXT * 3), view.logprob_of(TEXT * 2, TEXT * 2)
        monkeypatch.setattr("pytest_sway.backends.mlx.model.engine.CHUNK_POSITIONS", 5)
        monkeypatch.setattr("pytest_sway.backends.mlx.model.engine.PREFILL_POSITIONS", 7)
        assert np.allclose(view.rolling_logprob(TEXT * 3).logprobs, whole.logprobs, atol=1e-5)
        assert view.logprob_of(TEXT * 2, TEXT * 2) == pytest.approx(prompted, abs=1e-4)


def test_the_normaliser_of_a_large_vocabulary_is_exact_to_float32() -> None:
    logits = mx.random.normal((3, 50_001), key=mx.random.key(0)) * 5
    exact = np.array(logits).astype(np.float64)
    expected = np.log(np.exp(exact - exact.max()).sum(-1)) + exact.max()
    assert np.abs(np.array(_log_normaliser(logits)) - expected).max() < 5e-6
