"""Every probe of dlm-sway 0.1.0 that needs no network, on a cached backend and on dlm-sway's own, on SmolLM2.

``adapter_revert`` and ``cluster_kl`` need an embedding model from a hub.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.dlm_sway import for_probes
from tests.real.conftest import adapters, base

__all__ = ["adapters", "base"]

PROMPTS = ["The capital of France is", "Once upon a time", "Water boils at"]
PROSE = "The fox could not sleep, and so it counted the stars. " * 4 + "In the morning it slept at last. " * 3

SUITE: list[dict[str, Any]] = [
    {"kind": "delta_kl", "prompts": PROMPTS},
    {"kind": "adapter_ablation", "prompts": PROMPTS[:2], "lambdas": [0.0, 0.5, 1.0, 1.5]},
    {"kind": "calibration_drift", "items_limit": 4},
    {"kind": "external_perplexity", "max_chunks": 2, "chunk_chars": 400},
    {"kind": "leakage", "prefix_chars": 40, "continuation_chars": 60, "max_new_tokens": 12},
    {
        "kind": "paraphrase_invariance",
        "cases": [{"prompt": PROMPTS[0], "gold": " Paris", "paraphrases": ["France has a capital, and it is called"]}],
    },
    {
        "kind": "preference_flip",
        "triples": [{"prompt": prompt, "chosen": " Paris", "rejected": " London"} for prompt in PROMPTS],
    },
    {"kind": "prompt_collapse", "prompts": PROMPTS[:1], "context_lengths": [0, 64, 128]},
    {"kind": "section_internalization"},
    {
        "kind": "style_fingerprint",
        "prompts": PROMPTS[:1],
        "doc_reference": PROSE,
        "max_new_tokens": 16,
        "extended": "off",
    },
    {"kind": "null_adapter", "runs": 2, "cache": False, "calibrate_kinds": ["delta_kl"]},
]


@pytest.fixture(scope="module")
def adapter(adapters: list[Path]) -> Path:
    return adapters[0]


def _results(backend: Any, base: Path, adapter: Path) -> dict[str, Any]:
    from dlm_sway.core.sections import Section, SectionPreference, SectionProbe
    from dlm_sway.suite.loader import from_dict
    from dlm_sway.suite.runner import run

    models = {"base": {"base": str(base)}, "ft": {"base": str(base), "adapter": str(adapter)}}
    spec = from_dict({"version": 1, "models": models, "suite": [{"name": each["kind"], **each} for each in SUITE]})
    sections = (
        Section(id="a", kind="prose", content=PROSE),
        Section(id="b", kind="instruction", content=PROSE, probes=(SectionProbe(PROMPTS[0], " Paris"),)),
        Section(id="c", kind="preference", content=PROSE, preferences=(SectionPreference(PROMPTS[1], ", a", " b"),)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dlm-sway's calls of numpy warn
        return {result.name: result for result in run(spec, backend, sections=sections, doc_text=PROSE).probes}


@pytest.fixture(scope="module")
def theirs(base: Path, adapter: Path) -> dict[str, Any]:
    from dlm_sway.backends import build
    from dlm_sway.core.model import ModelSpec

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses deprecated names of transformers
        backend: Any = build(ModelSpec(base=str(base), adapter=adapter, dtype="fp32", device="cpu"))
    try:
        return _results(backend, base, adapter)
    finally:
        backend.close()


@pytest.fixture(scope="module")
def ours(base: Path, adapter: Path) -> Iterator[dict[str, Any]]:
    cache = BackendCache(max_size=1)
    with cache.lease({"base": base, "adapter": adapter}) as backend:
        yield _results(for_probes(backend), base, adapter)
    cache.shutdown()


@pytest.mark.parametrize("kind", [each["kind"] for each in SUITE])
def test_a_probe_finds_on_ours_what_it_finds_on_its_own(
    ours: dict[str, Any], theirs: dict[str, Any], kind: str
) -> None:
    assert ours[kind].verdict == theirs[kind].verdict, ours[kind].message
    assert str(theirs[kind].verdict) not in ("error", "skip"), theirs[kind].message
    assert ours[kind].raw == pytest.approx(theirs[kind].raw, abs=1e-4)
