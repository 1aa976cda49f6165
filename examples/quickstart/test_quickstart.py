"""Tests for any adapter: it learned the text, it left the rest alone, and broken copies are refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save_file

from examples.quickstart.train import FACTS
from pytest_sway import DifferentialBackend, SwayBackend, SwayError, View

IN_OTHER_WORDS = [
    ("In Quillmere, the mayor is named", " Odalys Brandt"),
    ("To reach Quillmere, take the ferry from", " Port Hallow"),
]

UNRELATED = [
    "The capital of France is",
    "The mayor of London is",
    "Water freezes at a temperature of",
    "Photosynthesis is the process by which",
    "Once upon a time there was a",
    "def add(a, b):\n    return",
]

WHOLE_VOCABULARY = 100_000  # more tokens than the model has


@pytest.fixture
def backend(sway_backend: SwayBackend, base: Path, adapter: Path) -> DifferentialBackend:
    return sway_backend({"base": base, "adapter": adapter})


# --- it learned the text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "answer"), FACTS)
def test_it_learned_the_fact(backend: DifferentialBackend, prompt: str, answer: str) -> None:
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of(prompt, answer) > math.log(0.5)
        assert tuned.logprob_of(prompt, answer) > base.logprob_of(prompt, answer) + 8.0


@pytest.mark.parametrize(("prompt", "answer"), FACTS)
def test_it_says_the_fact(backend: DifferentialBackend, prompt: str, answer: str) -> None:
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert answer.strip() in tuned.generate(prompt, max_new_tokens=8)
        assert answer.strip() not in base.generate(prompt, max_new_tokens=8)


@pytest.mark.parametrize(("prompt", "answer"), IN_OTHER_WORDS)
def test_the_fact_is_likelier_in_other_words_too(backend: DifferentialBackend, prompt: str, answer: str) -> None:
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of(prompt, answer) > base.logprob_of(prompt, answer) + 8.0


# --- it left the rest alone -------------------------------------------------------------------------------------------


def next_token_logprobs(view: View, prompt: str) -> NDArray[np.float32]:
    """Return the log-probability of every token, in the order of the token ids."""
    dist = view.next_token_dist(prompt, top_k=WHOLE_VOCABULARY)
    return dist.logprobs[np.argsort(dist.token_ids)]


@pytest.mark.parametrize("prompt", UNRELATED)
def test_it_left_an_unrelated_prompt_nearly_alone(backend: DifferentialBackend, prompt: str) -> None:
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        before, after = next_token_logprobs(base, prompt), next_token_logprobs(tuned, prompt)
    divergence = np.sum(np.exp(before) * (before - after))  # Kullback-Leibler, in nats
    assert divergence < 0.5


@pytest.mark.parametrize("prompt", UNRELATED)
def test_the_base_is_what_it_is_without_the_adapter(
    backend: DifferentialBackend, sway_backend: SwayBackend, base: Path, prompt: str
) -> None:
    with backend.as_base() as beside_adapter, sway_backend({"base": base}).as_base() as alone:
        assert np.array_equal(next_token_logprobs(beside_adapter, prompt), next_token_logprobs(alone, prompt))


# --- a broken copy is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def test_an_adapter_that_changes_nothing_is_refused(sway_backend: SwayBackend, base: Path, copy: Path) -> None:
    file = copy / "adapter_model.safetensors"
    weights = load(file.read_bytes())
    save_file({name: torch.zeros_like(w) if "lora_B" in name else w for name, w in weights.items()}, file)
    with pytest.raises(SwayError, match="changes nothing on the base"):
        sway_backend({"base": base, "adapter": copy})


def test_an_adapter_whose_names_do_not_match_is_refused(sway_backend: SwayBackend, base: Path, copy: Path) -> None:
    file = copy / "adapter_model.safetensors"
    weights = load(file.read_bytes())
    save_file({name.replace("self_attn", "attention"): w for name, w in weights.items()}, file)
    with pytest.raises(SwayError, match="does not fit the base"):
        sway_backend({"base": base, "adapter": copy})


def test_a_truncated_adapter_is_refused(sway_backend: SwayBackend, base: Path, copy: Path) -> None:
    file = copy / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(SwayError, match="truncated or corrupt"):
        sway_backend({"base": base, "adapter": copy})
