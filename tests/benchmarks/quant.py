"""The peak memory of a run with six adapters on one base in nf4, compared with the same run with one adapter."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples.smollm2 import smollm2_folder
from tests.benchmarks.figures import Figure, Run, ratio, run
from tests.tiny import make_adapter

ROUNDS = 5

SUITE = """
import pytest

BASE = {base!r}
ADAPTERS = {adapters!r}
KWARGS = {{"quantization_config": {{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}}}

@pytest.mark.parametrize("n", range(36))
def test_adapter(sway_backend, n):
    adapter = ADAPTERS[n % len(ADAPTERS)]
    backend = sway_backend({{"base": BASE, "adapter": adapter, "device": "cpu", "model_kwargs": KWARGS}})
    prompt = f"Question {{n}}: what is the capital of France?"
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert tuned.logprob_of(prompt, " Paris") != base.logprob_of(prompt, " Paris")
"""


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = smollm2_folder()
        adapters = [str(make_adapter(folder / f"adapter{n}", base, seed=n, r=8)) for n in range(6)]
        runs: dict[int, list[Run]] = {1: [], len(adapters): []}
        for _ in range(ROUNDS):
            for count, some in runs.items():
                place = folder / f"with{count}"
                place.mkdir(exist_ok=True)
                (place / "test_suite.py").write_text(SUITE.format(base=str(base), adapters=adapters[:count]))
                some.append(run(["-m", "pytest", "-q", "--sway-cache-size=6"], place))
    one, six = runs.values()
    loads = [int(n) for r in six for n in re.findall(r"^base .* \(nf4\): (\d+) loads?,", r.output, re.MULTILINE)]
    assert len(loads) == ROUNDS
    yield Figure("36 tests, six adapters on a base in nf4: base loads", 1, max(loads))
    peaks = [r.peak_bytes / 2**20 for r in six], [r.peak_bytes / 2**20 for r in one]
    yield ratio("36 tests, six adapters on a base in nf4: peak memory / one", 1.1, *peaks, "MiB")
