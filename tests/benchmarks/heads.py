"""Classification in batches, compared with the same texts one by one, on SmolLM2 with a classifier's adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from examples.smollm2 import smollm2_folder
from pytest_sway.cache.backend_cache import BackendCache
from tests.benchmarks.figures import Figure, medians
from tests.texts import lengths, texts
from tests.tiny import save_adapter

ROUNDS = 5
TEXTS = 64


def figures() -> Iterator[Figure]:
    import torch
    from peft import LoraConfig

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        base = smollm2_folder()
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        auto = "AutoModelForSequenceClassification"
        adapter = save_adapter(Path(name) / "adapter", base, config, scale=0.02, auto=auto, num_labels=3)
        cache = BackendCache(max_size=1)
        stack.callback(cache.shutdown)
        view = stack.enter_context(stack.enter_context(cache.lease({"base": base, "adapter": adapter})).as_finetuned())
        model, tokenizer = view.model, view.tokenizer
        asked = texts(tokenizer, lengths(TEXTS, 4, 24))

        def alone() -> list[Any]:
            with torch.inference_mode():
                return [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in asked]

        together = view.classify(asked)
        differs = max(
            float((torch.from_numpy(answer.logits) - logits).abs().max())
            for answer, logits in zip(together, alone(), strict=True)
        )
        seconds = medians(
            ROUNDS,
            together=lambda: view.classify(asked),
            one_by_one=lambda: [view.classify([text]) for text in asked],
            transformers=alone,
        )
        took = ", ".join(f"{side} {taken:.2f} s" for side, taken in seconds.items())
        what = f"{took}; {TEXTS} texts of 4 to 24 tokens"
        for peer in ("one_by_one", "transformers"):
            ratio = seconds[peer] / seconds["together"]
            yield Figure(f"classify, short texts, times {peer.replace('_', ' ')}", 2.0, ratio, what, at_least=True)
        yield Figure("classify, short texts, logits apart from transformers' alone", 1e-5, differs)
