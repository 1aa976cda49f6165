"""Adapters in mlx-lm's own format, and the results that mlx-lm itself computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from pytest_sway.backends.mlx.model.libraries import mlx_lm_module
from tests.tiny import TEXT

LORA = {"rank": 4, "scale": 5.0, "dropout": 0.1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make_native(
    folder: Path, base: Path, *, kind: str = "lora", layers: int = 2, scale: float = 0.3, **lora: Any
) -> Path:
    """Save an adapter for the model in ``base``, with noise of ``scale`` added to all trainable weights."""
    model, _ = mlx_lm_module("utils").load(str(base))
    mx.random.seed(5)
    model.freeze()
    parameters = LORA | lora
    if kind == "full":
        for layer in model.layers[-layers:]:
            layer.unfreeze()
    else:
        mlx_lm_module("tuner.utils").linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    trained = {
        name: array + scale * mx.random.normal(array.shape)
        for name, array in tree_flatten(model.trainable_parameters())
    }
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": None if kind == "full" else parameters}
    config["model"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def fresh_logits(base: Path, adapter: Path | None = None, **config: Any) -> Any:
    """The logits of `TEXT` from a model that mlx-lm itself loads: float32, shape ``(tokens, vocabulary)``."""
    model, tokenizer = mlx_lm_module("utils").load(
        str(base), adapter_path=None if adapter is None else str(adapter), model_config=config
    )
    return logits(model, tokenizer)


def logits(model: Any, tokenizer: Any) -> Any:
    """The logits of `TEXT`: float32, shape ``(tokens, vocabulary)``."""
    return np.array(model(mx.array([tokenizer.encode(TEXT)]))[0].astype(mx.float32))


def view_logits(view: Any) -> Any:
    """The logits of `TEXT` from a view's raw model."""
    return logits(view.model, view.tokenizer)


def edit_native(adapter: Path, change: Any) -> Path:
    """Apply ``change``, which works in place, to an adapter's tensors."""
    path = adapter / "adapters.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(path), tensors)
    return adapter
