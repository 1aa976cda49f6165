"""A suite of 36 tests over six adapters in the worst order, beside the best that is usually written by hand.

By hand means: a session fixture with one base, all adapters loaded once, ``set_adapter`` in each test, and the logits
of the answer alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, ratio, run
from tests.benchmarks.first import LARGE_VOCABULARY, make_random
from tests.tiny import make_adapter

PAIRS: Final = 5
PAIRS_OF_TEN: Final = 3
"""Fewer, since a run by hand with ten questions a test takes minutes."""

COMMON: Final = """
import pytest

BASE, ADAPTERS, QUESTIONS = {base!r}, {adapters!r}, {questions!r}
"""

BY_HAND: Final = """
@pytest.fixture(scope="session")
def loaded():
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, ADAPTERS[0], adapter_name="0")
    for n, adapter in enumerate(ADAPTERS[1:], 1):
        model.load_adapter(adapter, str(n))
    return AutoTokenizer.from_pretrained(BASE), model.eval()


def scores(tokenizer, model, questions):
    import torch

    found = []
    for prompt, answer in questions:
        start = len(tokenizer(prompt).input_ids)
        ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - start + 1).logits[0, :-1]
        found.append(float(logits.log_softmax(-1).gather(-1, ids[0, start:, None]).sum()))
    return found


@pytest.mark.parametrize("n", range(36))
def test_adapter(loaded, n):
    tokenizer, model = loaded
    model.set_adapter(str(n % 6))
    tuned = scores(tokenizer, model, QUESTIONS)
    with model.disable_adapter():
        base = scores(tokenizer, model, QUESTIONS)
    assert tuned != base
"""

SWAY: Final = """
@pytest.mark.parametrize("n", range(36))
def test_adapter(sway_backend, n):
    backend = sway_backend(base=BASE, adapter=ADAPTERS[n % 6])
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprobs_of(QUESTIONS) != base.logprobs_of(QUESTIONS)
"""

QUESTIONS: Final = [(f"{first} the sun rises in the", " east") for first in ("a", "of", "on", "is", "to", "and")] + [
    (f"paris is the capital {middle} france", " and the city of light") for middle in ("of", "in", "the", "a")
]


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        base = smollm2_folder()
        adapters = _adapters(Path(name), base)
        yield _suite(Path(name), "SmolLM2", base, adapters, QUESTIONS[-1:], 0.75)
        yield _suite(Path(name), "SmolLM2, ten questions a test", base, adapters, QUESTIONS, 0.6, PAIRS_OF_TEN)
    with tempfile.TemporaryDirectory() as name:
        base = make_random(Path(name) / "base", "float32", **LARGE_VOCABULARY)
        yield _suite(Path(name), "a vocabulary of 262k", base, _adapters(Path(name), base), QUESTIONS[-1:], 0.85)


def _adapters(folder: Path, base: Path) -> list[str]:
    return [str(make_adapter(folder / f"adapter{n}", base, seed=n, r=8)) for n in range(6)]


def _suite(
    folder: Path,
    what: str,
    base: Path,
    adapters: list[str],
    questions: list[tuple[str, str]],
    promised: float,
    pairs: int = PAIRS,
) -> Figure:
    sides: Mapping[str, tuple[str, list[str]]] = {
        "sway": (SWAY, ["--sway-cache-size=2"]),
        "by hand": (BY_HAND, ["-p", "no:pytest-sway"]),
    }
    common = COMMON.format(base=str(base), adapters=adapters, questions=questions)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for side, (source, _) in sides.items():
        place = folder / side / what.replace(" ", "_")
        place.mkdir(parents=True)
        (place / "test_suite.py").write_text(common + source)
    for turn in range(-1, pairs):  # a first run reads the files and writes bytecode
        for side, (_, options) in sides.items():
            place = folder / side / what.replace(" ", "_")
            done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *options], place)
            if turn >= 0:
                seconds[side].append(done.cpu_seconds)
    title = f"36 tests, 6 adapters: CPU / a session fixture, {what}"
    return ratio(title, promised, seconds["sway"], seconds["by hand"])
