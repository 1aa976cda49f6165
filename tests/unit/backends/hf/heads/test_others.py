"""Token classifiers and models for question answering: the right class on ``view.model``, and no questions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import save_file

from pytest_sway.errors import ScoringError, SpecError
from tests.tiny import make_gguf, make_tokenizer
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.heads.models import TEXTS, fresh_model, make_head_adapter, make_model

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.backends.hf.builder import HFBuilder

CASES = {
    "token_classification": ("TOKEN_CLS", "AutoModelForTokenClassification", "BertForTokenClassification", "logits"),
    "question_answering": ("QUESTION_ANS", "AutoModelForQuestionAnswering", "BertForQuestionAnswering", "start_logits"),
}


def _outputs(model: Any, tokenizer: Any, name: str) -> list[Any]:
    import torch

    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt"))[name].tolist() for text in TEXTS]


@pytest.mark.parametrize("task", CASES)
def test_the_model_is_of_the_tasks_class_and_computes_as_a_fresh_one(build: Any, tmp_path: Path, task: str) -> None:
    task_type, auto, name, output = CASES[task]
    folder = make_model(tmp_path / "base", "bert", auto)
    adapter = make_head_adapter(tmp_path / "adapter", folder, auto, task_type, targets=["query", "value"])
    backend = build(folder, adapter)
    assert backend.spec.task == task
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert type(plain.model).__name__ == name
        assert _outputs(plain.model, plain.tokenizer, output) == _outputs(*fresh_model(folder, auto), output)
        assert _outputs(tuned.model, tuned.tokenizer, output) == _outputs(*fresh_model(folder, auto, adapter), output)
        what = rf"the view 'ft' is a .* \(task='{task}'\): pytest-sway asks it nothing, and view\.model"
        with pytest.raises(ScoringError, match=what):
            tuned.logprob_of("the sun", " rises")
    assert backend.preflight_finite_check() == (True, "")
    assert backend.changes() == []


@pytest.mark.parametrize(("kind", "task"), [("t5", "causal"), ("bert", "seq2seq"), ("llama", "seq2seq")])
def test_a_type_without_such_a_class_is_named(build: Any, tmp_path: Path, kind: str, task: str) -> None:
    auto = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForMaskedLM", "llama": "AutoModelForCausalLM"}[kind]
    folder = make_model(tmp_path, kind, auto)
    with pytest.raises(SpecError, match=rf"has model_type = '{kind}', and transformers has no .* of that type"):
        build(folder, task=task)


def test_a_model_of_sounds_that_transformers_lists_as_sequence_to_sequence_is_none(
    builder: HFBuilder, loads: list[str], tmp_path: Path
) -> None:
    make_tokenizer(tmp_path)
    config = {"model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "model.safetensors")
    what = "has model_type = 'qwen2_audio', whose models have no decoder .* the folder of a sequence-to-sequence model"
    with pytest.raises(SpecError, match=what) as caught:
        builder(spec_of(tmp_path, task="seq2seq"))
    assert "is loaded with task='seq2seq'" not in str(caught.value)
    assert loads == []


def test_a_gguf_file_has_one_task(build: Any, base: Path, tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "model.gguf", base)
    with pytest.raises(SpecError, match=r"is a GGUF file, of a causal language model, so it has no task='embeddings'"):
        build(file, task="embeddings")
