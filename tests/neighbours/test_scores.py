"""The scores that lm-evaluation-harness's own tasks give, on SmolLM2."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.scores import Metric, exact_match, multiple_choice
from tests.neighbours import harness

CHOICES = [
    ("The capital of France is", ["Rome", "Paris", "a city whose name I have forgotten"], 1),
    ("Water freezes at", ["zero degrees", "one hundred degrees Celsius, as everybody knows"], 0),
    ("The opposite of hot is", ["cold", "warm", "tiède", "very hot indeed"], 0),
    ("Die Hauptstadt von Österreich ist", ["Wien", "Köln", "Zürich", "München"], 0),
    ("A dog is", ["a mineral", "an animal", "a number"], 1),
    ("Two and two are", ["three", "four", "twenty-two"], 1),
    ("Birds can", ["fly", "be bought on the market of every small town in the country"], 1),
    ("はい means", ["yes", "no", "多分"], 0),
]
CONTINUED = ["The capital of France is", "1, 2, 3, 4,", "The opposite of hot is", "Once upon a time"]


@pytest.fixture(scope="module")
def view(base: Path, adapters: list[Path]) -> Iterator[Any]:
    cache = BackendCache(max_size=1)
    with cache.lease({"base": base, "adapter": adapters[0]}) as backend, backend.as_finetuned() as view:
        yield view
    cache.shutdown()


def per_document(lm: Any, folder: Path, documents: list[dict[str, Any]], **config: Any) -> list[dict[str, Any]]:
    """What the harness's evaluation finds for each document, in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports what others have deprecated
        tasks: Any = import_module("lm_eval.api.task")
        evaluator: Any = import_module("lm_eval.evaluator")
        file = folder / "documents.jsonl"
        file.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
        task = tasks.ConfigurableTask(
            config={
                "task": "ours",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder)},
                "test_split": "test",
                "doc_to_text": "{{prompt}}",
                **config,
            }
        )
        samples = evaluator.evaluate(lm, {"ours": task}, bootstrap_iters=0, log_samples=True)["samples"]["ours"]
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def test_multiple_choice_counts_as_there(view: Any, tmp_path: Path) -> None:
    samples = per_document(
        harness.hflm(view.model, view.tokenizer),
        tmp_path,
        [{"prompt": prompt, "choices": choices, "label": label} for prompt, choices, label in CHOICES],
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="label",
        metric_list=[{"metric": metric} for metric in ("acc", "acc_norm", "acc_bytes")],
    )
    metrics: tuple[Metric, ...] = ("acc", "acc_norm", "acc_bytes")
    found = {metric: multiple_choice(metric)(view, list(CHOICES)) for metric in metrics}
    assert found == {metric: [sample[metric] for sample in samples] for metric in metrics}
    assert 0 < sum(map(float, found["acc"])) < len(CHOICES)  # neither all right nor all wrong
    assert len(set(map(tuple, found.values()))) > 1  # and the metrics tell something apart


@pytest.mark.parametrize(
    "ignored", [{}, {"ignore_case": True, "ignore_punctuation": True}, {"regexes_to_ignore": [r"\s+", "[a-m]"]}]
)
def test_exact_match_counts_as_there(view: Any, tmp_path: Path, ignored: dict[str, Any]) -> None:
    texts = view.generate_many(CONTINUED, max_new_tokens=8)
    answers = [texts[0].partition(".")[0], f"{texts[1].partition('.')[0].upper()}!", " cold", texts[3].replace(" ", "")]
    pairs = list(zip(CONTINUED, answers, strict=True))
    samples = per_document(
        harness.hflm(view.model, view.tokenizer),
        tmp_path,
        [{"prompt": prompt, "answer": answer} for prompt, answer in pairs],
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, **ignored}],
    )
    found = exact_match(max_new_tokens=8, until=["."], **ignored)(view, pairs)
    assert found == [sample["exact_match"] for sample in samples]
    assert len(set(map(float, found))) == 2
