"""dlm-sway's probes on a cached backend, instead of one that is loaded for each suite."""

from __future__ import annotations

from typing import Any

import pytest

from examples.quickstart.train import FACTS
from pytest_sway.dlm_sway import for_probes

SUITE = [
    {"name": "it says other things", "kind": "delta_kl", "prompts": [prompt for prompt, _ in FACTS]},
    {
        "name": "it prefers what it was taught",
        "kind": "preference_flip",
        "triples": [{"prompt": prompt, "chosen": answer, "rejected": " a"} for prompt, answer in FACTS],
    },
    {"name": "it reads English as before", "kind": "external_perplexity", "max_chunks": 2, "chunk_chars": 512},
]


@pytest.mark.filterwarnings("ignore")  # dlm-sway itself warns
def test_the_suite_passes(sway_backend: Any, spec: Any) -> None:
    from dlm_sway.suite.loader import from_dict
    from dlm_sway.suite.runner import run

    models = {"base": {"base": str(spec["base"])}, "ft": {"base": str(spec["base"]), "adapter": str(spec["adapter"])}}
    suite = from_dict({"version": 1, "models": models, "suite": SUITE})
    result = run(suite, for_probes(sway_backend(spec)))
    assert {probe.name: str(probe.verdict) for probe in result.probes} == {probe["name"]: "pass" for probe in SUITE}, [
        probe.message for probe in result.probes
    ]
