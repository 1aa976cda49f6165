"""Reference results of plain transformers and PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.tiny import TEXT, quiet

if TYPE_CHECKING:
    from pathlib import Path


def fresh(base: Path, adapter: Path | None = None, *, dtype: str = "float32", **kwargs: Any) -> tuple[Any, Any]:
    """Return a model, loaded with ``kwargs`` and with an adapter if one is given, and its tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, dtype), **kwargs)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    return model.eval(), tokenizer


def logits(model: Any, tokenizer: Any, text: str = TEXT) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).logits


def view_logits(view: Any, text: str = TEXT) -> Any:
    return logits(view.model, view.tokenizer, text)
