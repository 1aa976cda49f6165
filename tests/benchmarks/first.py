"""The first answer: one test with one question as a whole run, and the first question of a large model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, ratio, run
from tests.benchmarks.plain import DIFFER, LOAD
from tests.tiny import WORDS, make_adapter, make_tokenizer, quiet

PAIRS: Final = 5
QUESTIONS: Final = 7

COMMON: Final = """
BASE, ADAPTER = {base!r}, {adapter!r}
PROMPT, ANSWER = {prompt!r}, {answer!r}
"""

BY_HAND: Final = (
    LOAD
    + DIFFER
    + """
def test_adapter():
    assert differ(*load(BASE, ADAPTER))
"""
)

SWAY: Final = """
def test_adapter(sway_backend):
    backend = sway_backend(base=BASE, adapter=ADAPTER)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of(PROMPT, ANSWER) != base.logprob_of(PROMPT, ANSWER)
"""

QUESTION: Final = """
import json, time
from pytest_sway.cache.backend_cache import BackendCache

BASE, ADAPTER, COUNT = {base!r}, {adapter!r}, {count}
cache = BackendCache()
backend = cache.get_or_load({{"base": BASE, "adapter": ADAPTER}}).backend
seconds = []
with backend.as_finetuned() as view:
    for n in range(COUNT):
        started = time.perf_counter()
        view.logprob_of(f"w{{n}} the sun rises in the", " east")
        seconds.append(time.perf_counter() - started)
print(json.dumps(seconds))
"""

LARGE_VOCABULARY: Final[dict[str, Any]] = {
    "words": 262_144,
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
"""The sizes of a model of 270M."""

LARGE_MODEL: Final[dict[str, Any]] = {
    "words": 128_000,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""1.2 billion parameters."""


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        yield _one_test(Path(name), "SmolLM2", smollm2_folder(), "The capital of France is", " Paris")
    with tempfile.TemporaryDirectory() as name:
        base = make_random(Path(name) / "base", "float32", **LARGE_VOCABULARY)
        yield _one_test(Path(name), "a vocabulary of 262k", base, "the sun rises in the", " east")
    with tempfile.TemporaryDirectory() as name:
        yield _first_question(Path(name))


def _one_test(folder: Path, what: str, base: Path, prompt: str, answer: str) -> Figure:
    adapter = make_adapter(folder / "adapter", base, seed=1, r=8)
    texts = {"base": str(base), "adapter": str(adapter), "prompt": prompt, "answer": answer}
    sides = {"sway": (SWAY, []), "by hand": (BY_HAND, ["-p", "no:pytest-sway"])}
    for side, (source, _) in sides.items():
        place = folder / side
        place.mkdir()
        (place / "test_one.py").write_text(COMMON.format(**texts) + source)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(-1, PAIRS):  # a first run reads the files and writes bytecode
        for side, (_, options) in sides.items():
            done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *options], folder / side)
            if turn >= 0:
                seconds[side].append(done.cpu_seconds)
    return ratio(f"one test, one question: CPU / by hand, {what}", 1.05, seconds["sway"], seconds["by hand"])


def _first_question(folder: Path) -> Figure:
    base = make_random(folder / "base", "bfloat16", **LARGE_MODEL)
    adapter = make_adapter(folder / "adapter", base, seed=1, r=16)
    script = QUESTION.format(base=str(base), adapter=str(adapter), count=QUESTIONS)
    first, *later = json.loads(run(["-c", script], folder).output.strip().splitlines()[-1])
    return Figure(
        "1.2B parameters: the first question / the second",
        1.3,
        first / later[0],
        f"{first:.2f} s, {later[0]:.2f} s; median of the next {len(later) - 1}: {median(later[1:]):.2f} s",
    )


def make_random(folder: Path, dtype: str, *, words: int, **sizes: Any) -> Path:
    """Save a Llama with random weights, and a tokenizer of this many words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = make_tokenizer(folder, extra=tuple(f"w{n}" for n in range(words - len(WORDS) - 4)))
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **special, **sizes)
    before = torch.get_default_dtype()
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            model: Any = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        model.save_pretrained(folder)
    return folder
