"""lm-evaluation-harness as a peer: its `HFLM` around a loaded model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any


def hflm(model: Any, tokenizer: Any, batch_size: int = 8, **further: Any) -> Any:
    """Return the harness's own Hugging Face model around ``model``, with further arguments for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports deprecated modules
        models: Any = import_module("lm_eval.models.huggingface")
        return models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu", **further)


def rolling(lm: Any, texts: Sequence[str]) -> list[float]:
    """Return the log-likelihood of each text, in nats."""
    return list(lm.loglikelihood_rolling(_requests("loglikelihood_rolling", [(text,) for text in texts]), True))


def of_pairs(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the log-likelihood of each continuation after its context, in nats."""
    return [score for score, _ in lm.loglikelihood(_requests("loglikelihood", pairs), True)]


def written(lm: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """Return the text that the harness has the model write greedily after each prompt."""
    settings = {"until": [], "max_gen_toks": new_tokens, "do_sample": False, "num_beams": 1}
    return list(lm.generate_until(_requests("generate_until", [(prompt, settings) for prompt in prompts]), True))


def _requests(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    instance: Any = import_module("lm_eval.api.instance")
    return [instance.Instance(kind, {}, each, n) for n, each in enumerate(arguments)]
