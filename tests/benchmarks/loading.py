"""The load of a second adapter compared with a full load; and memory after each eviction."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from examples.smollm2 import smollm2_folder
from pytest_sway.cache.backend_cache import BackendCache
from tests.benchmarks.figures import Figure
from tests.tiny import make_adapter

ROUNDS = 9


def figures() -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        base = smollm2_folder()
        adapters = [make_adapter(Path(name) / f"adapter{n}", base, seed=n, r=8) for n in range(2)]
        yield _second_adapter(base, adapters)
        for dtype in ("float32", "bfloat16"):
            yield _memory_after_eviction(smollm2_folder(dtype), adapters[0], dtype)


def _second_adapter(base: Path, adapters: list[Path]) -> Figure:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def full_load() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        AutoTokenizer.from_pretrained(base)
        PeftModel.from_pretrained(model, adapters[1]).eval()

    cache = BackendCache(max_size=1)
    full, second = [], []
    cache.get_or_load({"base": base, "adapter": adapters[0]})  # so that imports and first-time costs count for neither
    for _ in range(ROUNDS):
        full.append(_seconds(full_load))
        gc.collect()
        for adapter in (adapters[1], adapters[0]):
            second.append(cache.get_or_load({"base": base, "adapter": adapter}).load_seconds)
    cache.shutdown()
    return Figure(
        "a second adapter / a full load",
        0.25,
        median(second) / median(full),
        f"medians: {median(second):.3f} s of {2 * ROUNDS}, {median(full):.3f} s of {ROUNDS}",
    )


def _memory_after_eviction(base: Path, adapter: Path, dtype: str) -> Figure:
    """Return the largest growth of the resident set over a load and its eviction, as a fraction of the base's bytes."""
    cache = BackendCache(max_size=1)
    size = 0
    growth = []
    for _ in range(4):
        before = _resident()
        cached = cache.get_or_load({"base": base, "adapter": adapter, "dtype": "fp32"})
        size = sum(cached.backend.sizes().values())
        with cached.backend.as_finetuned() as view:
            view.logprob_of("The capital of France is", " Paris")
        del cached, view
        cache.evict_all()
        growth.append(_resident() - before)
    cache.shutdown()
    first, later = growth[0], max(growth[1:])
    return Figure(
        f"resident after an eviction, {dtype} on disk / the base's size",
        0.10,
        max(growth) / size,
        f"first {first / 2**20:.1f} MiB, later at most {later / 2**20:.1f} MiB, of {size / 2**20:.0f} MiB",
    )


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _seconds(action: object) -> float:
    started = time.perf_counter()
    assert callable(action)
    action()
    return time.perf_counter() - started
