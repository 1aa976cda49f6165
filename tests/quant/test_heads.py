"""Classifiers on quantized bases: the logits of transformers and PEFT, and texts of LLM.int8 alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from tests.quant.test_on_load import FORMATS
from tests.tiny import make_base
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.heads.models import TEXTS, fresh_model, make_head_adapter, make_model, one_by_one
from tests.unit.backends.hf.insides import passes_of

if TYPE_CHECKING:
    from pathlib import Path

AUTO = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, which has no classifier's head."""
    return make_base(tmp_path_factory.mktemp("models") / "base", hidden=64)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_head_adapter(base.parent / "adapter", base, AUTO, "SEQ_CLS", num_labels=3)


def _logits(view: Any, texts: list[str]) -> list[list[float]]:
    return [answer.logits.tolist() for answer in view.classify(texts)]


@pytest.mark.parametrize("form", ["nf4", "int8", "torchao int8"])
def test_an_adapter_with_a_head_classifies_as_with_peft(base: Path, adapter: Path, form: str) -> None:
    settings, made = FORMATS[form]
    expected = one_by_one(*fresh_model(base, AUTO, adapter, num_labels=3, quantization_config=made(settings)), TEXTS)
    plain = one_by_one(*fresh_model(base, AUTO, adapter, num_labels=3), TEXTS)
    backend = HFBuilder(score_cache=0)(spec_of(base, adapter, model_kwargs={"quantization_config": settings}))
    assert backend.spec.task == "classification"
    with backend.as_finetuned() as view:
        assert [_logits(view, [text])[0] for text in TEXTS] == expected
        assert not np.allclose(expected, plain, atol=1e-3)  # the base is quantized
    assert backend.changes() == []
    backend.close()


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_classifier_is_quantized_with_its_head_as_transformers_does(tmp_path: Path, form: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
    folder, (settings, made) = make_model(tmp_path, "llama", AUTO, num_labels=3, **sizes), FORMATS[form]
    expected = one_by_one(*fresh_model(folder, AUTO, quantization_config=made(settings)), TEXTS)
    kwargs = {"quantization_config": settings}
    backend = HFBuilder(score_cache=0)(spec_of(folder, task="classification", model_kwargs=kwargs))
    with backend.as_base() as view:
        assert [_logits(view, [text])[0] for text in TEXTS] == expected
    assert backend.changes() == []
    backend.close()


def test_texts_of_llm_int8_are_classified_alone(base: Path, adapter: Path) -> None:
    settings, made = FORMATS["int8"]
    expected = one_by_one(*fresh_model(base, AUTO, adapter, num_labels=3, quantization_config=made(settings)), TEXTS)
    backend = HFBuilder(score_cache=0)(spec_of(base, adapter, model_kwargs={"quantization_config": settings}))
    with backend.as_finetuned() as view:
        passes = passes_of(view)
        assert _logits(view, TEXTS) == expected
    assert [rows for rows, _ in passes] == [1] * len(TEXTS)
    backend.close()


@pytest.mark.parametrize("form", ["nf4", "torchao int8"])
def test_texts_of_other_formats_are_classified_in_batches(base: Path, adapter: Path, form: str) -> None:
    settings, _ = FORMATS[form]
    backend = HFBuilder(score_cache=0)(spec_of(base, adapter, model_kwargs={"quantization_config": settings}))
    with backend.as_finetuned() as view:
        alone = [_logits(view, [text])[0] for text in TEXTS]
        assert np.allclose(_logits(view, TEXTS), alone, atol=0.05)
        passes = passes_of(view)
        view.classify([f"{text} !" for text in TEXTS])
    assert max(rows for rows, _ in passes) > 1
    backend.close()
