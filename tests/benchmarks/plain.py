"""The source of a test that loads and asks a model with transformers and PEFT alone, for the suites to compare with."""

from __future__ import annotations

from typing import Final

LOAD: Final = """
def load(base, adapter):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return tokenizer, PeftModel.from_pretrained(model, adapter).eval()
"""

DIFFER: Final = """
def differ(tokenizer, model):
    import torch

    ids = tokenizer(PROMPT + ANSWER, return_tensors="pt").input_ids
    with torch.inference_mode():
        tuned = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
        with model.disable_adapter():
            base = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
    return tuned != base
"""

LIBRARIES: Final = """
import pytest

@pytest.fixture(scope="session", autouse=True)
def libraries():
    # The imports are in the wall time of every suite, and in the loading of none.
    import importlib.util
    import peft
    if importlib.util.find_spec("bitsandbytes"):
        import peft.tuners.lora.bnb  # PEFT imports it with the first adapter
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    AutoModelForCausalLM, AutoTokenizer
"""
