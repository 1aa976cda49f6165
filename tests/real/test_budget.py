"""The size of a load is estimated before it from the headers of the files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from examples.smollm2 import smollm2_folder
from pytest_sway.backends.registry import Builder
from pytest_sway.spec.parsing import parse_spec


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("computed", ["fp32", "bf16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_an_estimate_is_within_two_percent_of_what_is_loaded(
    adapters: list[Path], tmp_path: Path, stored: Any, computed: str, sharded: bool
) -> None:
    base = _sharded(smollm2_folder(stored), tmp_path / "sharded") if sharded else smollm2_folder(stored)
    builder = Builder()
    spec = builder.resolve(parse_spec({"base": base, "adapter": adapters[0], "dtype": computed, "device": "cpu"}))
    estimated = builder.check(spec).sizes
    backend: Any = builder(spec)
    try:
        with backend.as_finetuned() as view:
            sizes_of = {name: p.numel() * p.element_size() for name, p in view.model.named_parameters()}
        adapter_bytes = sum(size for name, size in sizes_of.items() if "lora_" in name)
        base_bytes = sum(sizes_of.values()) - adapter_bytes
        measured = backend.sizes()
    finally:
        backend.close()
    assert estimated is not None
    assert set(estimated) == set(measured)
    for sizes in (estimated, measured):
        assert sorted(sizes.values()) == pytest.approx([adapter_bytes, base_bytes], rel=0.02)


def _sharded(folder: Path, into: Path) -> Path:
    from transformers import AutoModelForCausalLM

    from tests.tiny import quiet

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        model.save_pretrained(into, max_shard_size="100MB")
    for file in folder.glob("*token*"):
        shutil.copy(file, into)
    assert len(list(into.glob("*.safetensors"))) > 1
    return into
