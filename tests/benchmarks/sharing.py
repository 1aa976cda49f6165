"""The private memory of each of two pytest-xdist workers for a base that is stored in bf16 and computed in fp32.

Private memory is the unique set size, ``Private_Clean + Private_Dirty`` of Linux's smaps_rollup: the memory that would
be freed if the process ended. Both workers read it after importing torch, transformers and PEFT, and again after both
have loaded the base with an adapter and scored once on each side.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, run
from tests.tiny import make_adapter

COMMON = """
import os
import re
from pathlib import Path

BASE, ADAPTER = {base!r}, {adapter!r}
PROMPT, ANSWER = "The capital of France is", " Paris"
WORKER = os.environ["PYTEST_XDIST_WORKER"]

def own_bytes():
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(kib) for kib in re.findall(r"^Private_(?:Clean|Dirty):\\s+(\\d+)", text, re.MULTILINE))

def meet(place):
    "Wait until the other worker is there too."
    os.close(os.open(place, os.O_RDONLY if WORKER == "gw1" else os.O_WRONLY))

def measure(load_and_score):
    import peft, torch, transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama
    AutoModelForCausalLM, AutoTokenizer
    meet("imported")
    before = own_bytes()
    meet("started")
    held = load_and_score()
    meet("scored")
    Path(WORKER).write_text(str(own_bytes() - before))
    meet("measured")
"""

PLAIN = (
    COMMON
    + """
import pytest

@pytest.fixture(scope="session")
def model():
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(BASE), PeftModel.from_pretrained(model, ADAPTER).eval()

def test_memory(request):
    def load_and_score():
        import torch
        tokenizer, model = request.getfixturevalue("model")
        ids = tokenizer(PROMPT + ANSWER, return_tensors="pt").input_ids
        with torch.inference_mode():
            tuned = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
            with model.disable_adapter():
                assert tuned != model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
        return model
    measure(load_and_score)
"""
)

SWAY = (
    COMMON
    + """
def test_memory(sway_backend):
    def load_and_score():
        backend = sway_backend({{"base": BASE, "adapter": ADAPTER, "device": "cpu", "dtype": "fp32"}})
        with backend.as_base() as base, backend.as_finetuned() as tuned:
            assert tuned.logprob_of(PROMPT, ANSWER) != base.logprob_of(PROMPT, ANSWER)
        return backend
    measure(load_and_score)
"""
)


def figures() -> Iterator[Figure]:
    base = smollm2_folder("bfloat16")
    base_bytes = 2 * (base / "model.safetensors").stat().st_size
    with tempfile.TemporaryDirectory() as name:
        adapter = make_adapter(Path(name) / "adapter", base, seed=1, r=8)
        grown = {
            suite: _grown(Path(name) / suite, source.format(base=str(base), adapter=str(adapter)))
            for suite, source in (("plain", PLAIN), ("sway", SWAY))
        }
    ours, theirs = _listed(grown["sway"]), _listed(grown["plain"])
    yield Figure(
        "each worker's own memory, bf16 on disk, fp32 computed: MB",
        0.05 * base_bytes / 1e6 + 60,
        max(grown["sway"]),
        f"{ours}; plain session fixtures: {theirs}; the base: {base_bytes / 1e6:.0f}",
    )


def _grown(folder: Path, source: str) -> list[float]:
    """Return the growth of each of two workers, in MB."""
    folder.mkdir()
    (folder / "test_memory.py").write_text(source)
    for place in ("imported", "started", "scored", "measured"):
        os.mkfifo(folder / place)
    run(["-m", "pytest", "-q", "-n2", "--dist=each"], folder)
    return [json.loads((folder / worker).read_text()) / 1e6 for worker in ("gw0", "gw1")]


def _listed(sizes: list[float]) -> str:
    return " and ".join(f"{size:.0f}" for size in sizes)
