"""Models with random weights, made on the spot, of a size that suits the device."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Final

from tests.gpu.device import DEVICE, ON_CUDA
from tests.tiny import WORDS, make_adapter, make_base, make_tokenizer, quiet

LINEAR: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MEDIUM: Final[dict[str, Any]] = (
    {"hidden": 1024, "layers": 12, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8}
    if ON_CUDA
    else {"hidden": 64, "layers": 2}
)
"""About 190 million parameters on a GPU."""

LARGE: Final[dict[str, Any]] = (
    {
        "vocabulary": 128_000,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    if ON_CUDA
    else {
        "vocabulary": 2_000,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
"""1.2 billion parameters on a GPU."""


def make_medium(folder: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    make_base(folder, seed=seed, dtype=dtype, max_position_embeddings=4096, initializer_range=0.05, **MEDIUM)
    _allow_long_texts(folder)
    return folder


def make_medium_adapter(folder: Path, base: Path, *, seed: int = 1) -> Path:
    return make_adapter(folder, base, seed=seed, r=16, targets=LINEAR, scale=0.02)


def make_large(folder: Path) -> Path:
    """Make a Llama on the device and save it in bf16, with a tokenizer of whole words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(LARGE)
    words = settings.pop("vocabulary")
    vocabulary = make_tokenizer(folder, extra=tuple(f"w{n}" for n in range(words - len(WORDS) - 4)))
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **settings,
    )  # fmt: skip
    _allow_long_texts(folder)
    with quiet(), torch.device(DEVICE):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_large_adapter(folder: Path, base: Path, *, seed: int = 1) -> Path:
    return make_adapter(folder, base, seed=seed, r=16, targets=LINEAR, scale=0.02)


def _allow_long_texts(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 4096}))


def texts(lengths: list[int], seed: int = 0) -> list[str]:
    """Return texts of the given numbers of words; each word is a token."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) for length in lengths]
