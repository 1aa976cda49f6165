from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import AdapterMismatchError
from tests.tiny import edit_weights, make_adapter, make_tokenizer, quiet
from tests.unit.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A model whose layers keep their weights transposed, and whose output embeddings are its input's."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    words = make_tokenizer(folder)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=words, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_transposed_layers_are_served_and_shared(build: Any, gpt2: Path, tmp_path: Path, loads: list[str]) -> None:
    for seed in (1, 2):
        folder = make_adapter(tmp_path / str(seed), gpt2, targets=("c_attn", "c_proj"), seed=seed, fan_in_fan_out=True)
        backend = build(gpt2, folder)
        with backend.as_base() as plain, backend.as_finetuned() as tuned:
            assert view_logits(tuned).equal(logits(*fresh(gpt2, folder)))
            assert view_logits(plain).equal(logits(*fresh(gpt2)))
    assert len(loads) == 1


@pytest.mark.parametrize("target", ["c_attn", "c_proj", "wte", "lm_head"])
def test_dora_that_was_never_trained_is_refused_whichever_way_its_weights_lie(
    build: Any, gpt2: Path, tmp_path: Path, target: str
) -> None:
    with quiet():
        adapter = make_adapter(
            tmp_path / "adapter", gpt2, targets=(target,), zero_b=True, use_dora=True, fan_in_fan_out=target[1] == "_"
        )
    edit_weights(adapter, lambda tensors: {n: t for n, t in tensors.items() if "lora_" in n})
    with pytest.raises(AdapterMismatchError, match=r"changes nothing .* Was it saved before it was trained"):
        build(gpt2, adapter)


@pytest.mark.filterwarnings("ignore:the adapter .* was trained on:pytest_sway.SwayWarning")
def test_an_adapter_for_another_architecture_is_refused_and_harms_nobody(
    build: Any, base: Path, gpt2: Path, tmp_path: Path, adapter: Path
) -> None:
    stranger = make_adapter(tmp_path / "stranger", gpt2, targets=("c_attn",), fan_in_fan_out=True)
    backend = build(base, adapter)
    with pytest.raises(AdapterMismatchError, match="does not fit the base"):
        build(base, stranger)
    assert backend.changes() == []
    with pytest.raises(AdapterMismatchError, match=r"does not fit the base .*[qv]_proj"):
        build(gpt2, adapter)
