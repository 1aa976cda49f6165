"""The hf backend on a real model: exact to the bit, equal to dlm-sway, and freed after its close."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from tests.tiny import quiet

PROMPT = "The capital of France is"
PAIRS = [
    (PROMPT, " Paris"),
    ("Water boils at a temperature of", " one hundred degrees Celsius at sea level."),
    ("def add(a, b):\n    return", " a + b\n"),
    ("Once upon a time", " there was a fox who could not sleep, and so it counted the stars one by one."),
]


def _logits(model: Any, tokenizer: Any, text: str) -> Any:
    import torch

    with torch.inference_mode():
        return model(tokenizer(text, return_tensors="pt").input_ids).logits


def test_base_and_tuned_logits_are_bit_equal_to_a_fresh_model_s(
    cache: BackendCache, base: Path, adapters: list[Path]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(base)
        fresh: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        expected_base = _logits(fresh, tokenizer, PROMPT)
        expected_tuned = _logits(PeftModel.from_pretrained(fresh, str(adapters[1])).eval(), tokenizer, PROMPT)
    cache.get_or_load({"base": base, "adapter": adapters[0]})
    with (
        cache.lease({"base": base, "adapter": adapters[1]}) as backend,
        backend.as_base() as base_view,
        backend.as_finetuned() as tuned_view,
    ):
        for _ in range(2):
            assert torch.equal(_logits(base_view.model, base_view.tokenizer, PROMPT), expected_base)
            assert torch.equal(_logits(tuned_view.model, tuned_view.tokenizer, PROMPT), expected_tuned)
    assert not torch.equal(expected_base, expected_tuned)


def test_scores_agree_with_dlm_sway(cache: BackendCache, base: Path, adapters: list[Path]) -> None:
    dlm = pytest.importorskip("dlm_sway.backends")
    from dlm_sway.core.model import ModelSpec

    spec = ModelSpec(base=str(base), adapter=adapters[0], dtype="fp32", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses deprecated names of transformers
        theirs = dlm.build(spec)
    try:
        with cache.lease(spec) as ours:
            for side in ("as_base", "as_finetuned"):
                with getattr(ours, side)() as our_view, getattr(theirs, side)() as their_view:
                    for prompt, completion in PAIRS:
                        _compare(our_view, their_view, prompt, completion)
    finally:
        theirs.close()


def _compare(ours: Any, theirs: Any, prompt: str, completion: str) -> None:
    assert ours.logprob_of(prompt, completion) == pytest.approx(theirs.logprob_of(prompt, completion), rel=1e-4)
    text = prompt + completion
    our_text, their_text = ours.rolling_logprob(text, prefix=False), theirs.rolling_logprob(text)
    assert np.array_equal(our_text.token_ids, their_text.token_ids)
    assert np.allclose(our_text.logprobs, their_text.logprobs, atol=1e-4)
    assert our_text.total_logprob == pytest.approx(their_text.total_logprob, rel=1e-4)
    our_dist, their_dist = ours.next_token_dist(prompt, top_k=32), theirs.next_token_dist(prompt, top_k=32)
    assert np.allclose(our_dist.logprobs, their_dist.logprobs, atol=1e-4)
    assert our_dist.vocab_size == their_dist.vocab_size
    assert our_dist.tail_logprob == pytest.approx(their_dist.tail_logprob, abs=1e-3)
    assert ours.generate(prompt, max_new_tokens=8) == theirs.generate(prompt, max_new_tokens=8)


def test_six_swaps_of_three_adapters_load_the_base_once(base: Path, adapters: list[Path]) -> None:
    loads: list[str] = []
    small = BackendCache(max_size=1, build=Builder(on_base_load=lambda name, seconds: loads.append(name)))
    scores = []
    for n in range(6):
        with small.lease({"base": base, "adapter": adapters[n % 3]}) as backend, backend.as_finetuned() as tuned:
            scores.append(tuned.logprob_of(*PAIRS[0]))
    small.shutdown()
    assert loads == [str(base)]
    assert scores[:3] == scores[3:]
    assert len(set(scores)) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_the_weights_is_left_after_a_close(cache: BackendCache, adapters: list[Path], dtype: Any) -> None:
    from examples.smollm2 import smollm2_folder

    cached = cache.get_or_load({"base": smollm2_folder(dtype), "adapter": adapters[0], "dtype": "fp32"})
    with cached.backend.as_finetuned() as view:
        view.logprob_of(*PAIRS[0])
    assert sum(cached.backend.sizes().values()) > 500 * 2**20
    cache.evict_all()
    assert cached.backend.leak() is None
