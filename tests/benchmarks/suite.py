"""A suite of 36 tests over six adapters in the worst order, compared with the same suite that loads in each test."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, Run, run
from tests.tiny import make_adapter

ROUNDS = 3

COMMON = """
import time
import pytest

BASE = {base!r}
ADAPTERS = {adapters!r}
PROMPT, ANSWER = "The capital of France is", " Paris"
"""

FRESH = (
    COMMON
    + """
@pytest.mark.parametrize("n", range(36))
def test_adapter(n):
    started = time.perf_counter()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if n:
        started = time.perf_counter()  # the imports are in both suites' wall time, and in neither's loading
    else:
        AutoTokenizer, AutoModelForCausalLM, PeftModel
        started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, ADAPTERS[n % 6]).eval()
    print("LOADED", time.perf_counter() - started)
    ids = tokenizer(PROMPT + ANSWER, return_tensors="pt").input_ids
    with torch.inference_mode():
        tuned = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
        with model.disable_adapter():
            base = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]
    assert tuned != base
"""
)

SWAY = (
    COMMON
    + """
@pytest.mark.parametrize("n", range(36))
def test_adapter(sway_backend, n):
    backend = sway_backend({{"base": BASE, "adapter": ADAPTERS[n % 6]}})
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of(PROMPT, ANSWER) != base.logprob_of(PROMPT, ANSWER)
"""
)

LOADED = """
def pytest_sway_backend_loaded(cached):
    print("LOADED", cached.load_seconds)
"""

ONE_BASE_TWO_ADAPTERS = (
    COMMON
    + """
def test_both():
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, ADAPTERS[0]).eval()
    model.load_adapter(ADAPTERS[1], "second")
    ids = tokenizer(PROMPT + ANSWER, return_tensors="pt").input_ids
    with torch.inference_mode():
        for name in ("default", "second"):
            model.set_adapter(name)
            model(ids)
        with model.disable_adapter():
            model(ids)
"""
)


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = smollm2_folder()
        adapters = [str(make_adapter(folder / f"adapter{n}", base, seed=n, r=8)) for n in range(6)]
        suites = {
            suite: _suite(folder / suite, source.format(base=str(base), adapters=adapters))
            for suite, source in (("fresh", FRESH), ("sway", SWAY), ("reference", ONE_BASE_TWO_ADAPTERS))
        }
        (suites["sway"] / "conftest.py").write_text(LOADED)
        runs: dict[str, list[Run]] = {suite: [] for suite in suites}
        for _ in range(ROUNDS):
            for suite, place in suites.items():
                runs[suite].append(run(["-m", "pytest", "-q", "-s", "--sway-cache-size=2"], place))
    fresh, sway, reference = runs["fresh"], runs["sway"], runs["reference"]
    base_loads = [
        int(match[1]) for r in sway if (match := re.search(r"^base .*: (\d+) loads?,", r.output, re.MULTILINE))
    ]
    assert len(base_loads) == ROUNDS
    yield Figure("36 tests, six adapters, cache of 2: base loads", 1, max(base_loads))
    yield _ratio("36 tests: seconds spent loading / fresh in each test", 0.30, _loading(sway), _loading(fresh), "s")
    wall = [r.seconds for r in sway], [r.seconds for r in fresh]
    yield _ratio("36 tests: wall time / fresh in each test", 0.65, *wall, "s")
    peak = [r.peak_bytes / 2**20 for r in sway], [r.peak_bytes / 2**20 for r in reference]
    yield _ratio("36 tests: peak memory / one base with two adapters", 1.25, *peak, "MiB")


def _suite(folder: Path, source: str) -> Path:
    folder.mkdir()
    (folder / "test_suite.py").write_text(source)
    return folder


def _loading(runs: list[Run]) -> list[float]:
    return [sum(float(seconds) for seconds in re.findall(r"LOADED (\S+)", r.output)) for r in runs]


def _ratio(name: str, promised: float, ours: list[float], theirs: list[float], unit: str) -> Figure:
    detail = f"medians of {ROUNDS}: {median(ours):.2f} {unit}, {median(theirs):.2f} {unit}"
    return Figure(name, promised, median(ours) / median(theirs), detail)
