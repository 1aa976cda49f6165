"""A custom task of lm-evaluation-harness, scored by its HFLM on both sides of one backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness imports deprecated modules


@pytest.fixture(scope="module")
def task() -> Any:
    import yaml
    from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load((HERE / "town.yaml").read_text())
    return ConfigurableTask(config={**config, "dataset_kwargs": {"data_files": {"test": str(HERE / "town.jsonl")}}})


def accuracy(view: Any, task: Any) -> float:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=view.model, tokenizer=view.tokenizer, batch_size=4, device="cpu")
    results = evaluate(lm, {"town": task}, bootstrap_iters=0)
    return float(results["results"]["town"]["acc,none"])


def test_the_adapter_knows_the_town(sway_backend: Any, spec: Any, task: Any) -> None:
    backend = sway_backend(spec)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert accuracy(tuned, task) == 1.0
        assert accuracy(base, task) < 0.8
