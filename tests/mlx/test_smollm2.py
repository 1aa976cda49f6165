"""The mlx backend on a real model: it agrees with the hf backend, and serves an adapter that mlx-lm has trained."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from examples.smollm2 import smollm2_folder
from pytest_sway.backends.mlx.model.libraries import mlx_lm_module
from tests.mlx.test_agreement import compare
from tests.tiny import make_adapter

Build = Callable[..., Any]
LEARNED = ("The capital of Atlantis is", " Poseidonis")
PAIRS = [
    ("The capital of France is", " Paris"),
    ("Water boils at a temperature of", " one hundred degrees Celsius at sea level."),
    ("def add(a, b):\n    return", " a + b\n"),
    ("Once upon a time", " there was a fox who could not sleep, and so it counted the stars one by one."),
    LEARNED,
]
PROMPTS = ["The capital of France is", "Once upon a time", "1, 2, 3,"]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="module")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that mlx-lm's command has trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    text = json.dumps({"text": f"{LEARNED[0]}{LEARNED[1]}."})
    for part in ("train", "valid"):
        (folder / f"{part}.jsonl").write_text(f"{text}\n" * 4)
    command = "-m mlx_lm lora --train --fine-tune-type lora --num-layers 2 --batch-size 1 --iters 6 --val-batches 1"
    paths = ["--model", str(smollm2), "--data", str(folder), "--adapter-path", str(folder / "adapter")]
    done = subprocess.run(
        [sys.executable, *command.split(), "--learning-rate", "1e-3", *paths],
        check=False,
        timeout=500,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "adapter"


def test_a_peft_adapter_gives_what_the_hf_backend_gives(build: Build, smollm2: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", smollm2, r=8, scale=0.02, targets="all-linear")
    compare(build(smollm2, adapter), build(smollm2, adapter, kind="hf"), PAIRS, PROMPTS[:2])


def test_an_adapter_that_mlx_lm_trained_gives_what_it_gives_in_peft(
    build: Build, smollm2: Path, trained: Path, tmp_path: Path, loads: list[str]
) -> None:
    ours, theirs = build(smollm2, trained), build(smollm2, _as_peft(trained, tmp_path / "peft"), kind="hf")
    compare(ours, theirs, [LEARNED], PROMPTS[:1])
    compare(build(smollm2, tmp_path / "peft"), theirs, [LEARNED], PROMPTS[2:])
    with ours.as_base() as plain, ours.as_finetuned() as tuned:
        assert tuned.logprob_of(*LEARNED) > plain.logprob_of(*LEARNED) + 1.0
    assert loads == [str(smollm2)] * 2  # one of each kind


def _as_peft(adapter: Path, folder: Path) -> Path:
    """Write mlx-lm's adapter in PEFT's format."""
    from peft import LoraConfig
    from safetensors.numpy import save_file

    tensors = mx.load(str(adapter / "adapters.safetensors"))
    parameters = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]
    letters = {"lora_a": "lora_A", "lora_b": "lora_B"}
    turned: dict[str, Any] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        turned[f"base_model.model.{module}.{letters[leaf]}.weight"] = np.ascontiguousarray(np.array(tensor).T)
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    rank = parameters["rank"]
    config = LoraConfig(r=rank, lora_alpha=parameters["scale"] * rank, target_modules=modules, task_type="CAUSAL_LM")
    config.inference_mode = True
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file(turned, folder / "adapter_model.safetensors")
    return folder


def test_a_base_that_mlx_lm_converted_to_bf16_is_close_to_the_hf_backends(
    build: Build, smollm2: Path, tmp_path: Path
) -> None:
    mlx_lm_module("convert").convert(str(smollm2), str(tmp_path / "mlx"), dtype="bfloat16")
    with build(tmp_path / "mlx").as_base() as ours, build(smollm2, kind="hf").as_base() as theirs:
        assert ours.logprobs_of(PAIRS) == pytest.approx(theirs.logprobs_of(PAIRS), rel=0.02, abs=0.3)


def test_messages_are_rendered_as_the_hf_backend_renders_them(build: Build, smollm2: Path) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with build(smollm2).as_base() as ours, build(smollm2, kind="hf").as_base() as theirs:
        assert ours.render(messages) == theirs.render(messages)
        assert ours.logprob_of(messages, "Paris") == pytest.approx(theirs.logprob_of(messages, "Paris"), abs=1e-3)
        assert ours.generate(messages, max_new_tokens=8) == theirs.generate(messages, max_new_tokens=8)
