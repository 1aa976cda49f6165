"""Kind ``mlx`` without mlx: specs are refused with advice, and so are adapters that it does not support."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import AdapterMismatchError, BackendNotAvailableError
from pytest_sway.spec.model_spec import ModelSpec


@pytest.mark.parametrize("refuse", [Builder(), Builder().check, BackendCache().acquire])
def test_without_mlx_the_line_that_installs_it_is_named(
    refuse: Callable[[ModelSpec], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sway.backends.mlx.model.libraries.find_spec", lambda name: None)
    sentence = (
        "loading mlx:org/a needs mlx and mlx-lm, which this environment lacks."
        " Install them with: pip install 'pytest-sway[mlx]'"
    )
    with pytest.raises(BackendNotAvailableError, match=f"^{re.escape(sentence)}$"):
        refuse(ModelSpec(kind="mlx", base="org/a"))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"peft_type": "VERA"}, "mlx-lm has no layers for the type VERA"),
        ({"bias": "lora_only"}, "it brings biases (bias='lora_only')"),
        ({"lora_bias": True}, "mlx-lm's LoRA layers have nothing for lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "mlx-lm's LoRA layers have nothing for modules_to_save=['lm_head']"),
        ({"trainable_token_indices": [3]}, "mlx-lm's LoRA layers have nothing for trainable_token_indices=[3]"),
        ({"target_parameters": ["w"]}, "mlx-lm's LoRA layers have nothing for target_parameters=['w']"),
        ({"layer_replication": [[0, 2]]}, "mlx-lm's LoRA layers have nothing for layer_replication=[[0, 2]]"),
        ({"something_new": 1}, "mlx-lm's LoRA layers have nothing for something_new=1"),
        ({"init_lora_weights": "pissa"}, "its initialisation 'pissa' rewrites the base's own weights"),
        ({"init_lora_weights": "loftq"}, "its initialisation 'loftq' rewrites the base's own weights"),
    ],
)
def test_an_adapter_that_cannot_be_converted_exactly_is_refused(
    tmp_path: Path, fields: dict[str, Any], why: str
) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "init_lora_weights": True} | fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    sentence = f"the adapter {str(tmp_path)!r} of PEFT cannot be converted to MLX exactly: {why}. Use kind='hf' for it."
    with pytest.raises(AdapterMismatchError, match=f"^{re.escape(sentence)}$"):
        Builder().check(ModelSpec(kind="mlx", base="org/a", adapter=tmp_path))
