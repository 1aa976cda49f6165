"""SmolLM2 as the GGUF file of its package, and as the folder converted from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.smollm2 import smollm2_gguf
from pytest_sway.spec.model_spec import ModelSpec

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.cache.backend_cache import BackendCache

TEXT = "The capital of France is Paris, isn't it?\n\n  def f(x): return x**2 \u2014 caf\u00e9"


def test_the_file_is_the_same_model_and_tokenizer_as_the_folder(
    cache: BackendCache, base: Path, adapters: list[Path]
) -> None:
    import torch

    models = [ModelSpec(base=str(path), adapter=adapters[0], device="cpu") for path in (smollm2_gguf(), base)]
    with cache.lease(models[0]) as file, cache.lease(models[1]) as folder:
        for mine, theirs in ((file.as_base(), folder.as_base()), (file.as_finetuned(), folder.as_finetuned())):
            with mine as view, theirs as expected, torch.inference_mode():
                ids = expected.tokenizer(TEXT)["input_ids"]
                assert view.tokenizer(TEXT)["input_ids"] == ids
                assert view.tokenizer.decode(ids) == TEXT
                assert view.tokenizer.chat_template == expected.tokenizer.chat_template
                assert view.tokenizer.special_tokens_map == expected.tokenizer.special_tokens_map
                assert view.model(torch.tensor([ids])).logits.equal(expected.model(torch.tensor([ids])).logits)
                assert view.logprob_of(TEXT, " Yes.") == expected.logprob_of(TEXT, " Yes.")
