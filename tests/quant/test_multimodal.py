"""A multimodal base in four bits is asked for text: the numbers of transformers and PEFT with the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from tests.quant.test_on_load import FORMATS
from tests.tiny import quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.multimodal import SPECIMENS, Specimen, make_multimodal, plain_model, train, with_adapter
from tests.unit.backends.hf.reference import logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
LLAVA, QWEN = (next(each for each in SPECIMENS if each.name == name) for name in ("llava", "qwen2_5_vl"))


@pytest.mark.parametrize("specimen", [LLAVA, QWEN], ids=str)
def test_a_multimodal_base_in_nf4_and_its_adapter_score_text_as_with_transformers(
    tmp_path: Path, specimen: Specimen
) -> None:
    from transformers import AutoTokenizer

    folder = make_multimodal(tmp_path / "base", specimen, **SIZES)
    adapter = train(plain_model(folder, specimen), tmp_path / "adapter", target_modules=specimen.targets)
    settings, made = FORMATS["nf4"]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    alone = logits(plain_model(folder, specimen, quantization_config=made(settings)), tokenizer)
    with with_adapter(plain_model(folder, specimen, quantization_config=made(settings)), adapter) as model, quiet():
        expected = logits(model, tokenizer)
    assert not alone.allclose(logits(plain_model(folder, specimen), tokenizer), atol=1e-2)  # it is quantized
    backend = HFBuilder()(spec_of(folder, adapter, model_kwargs={"quantization_config": settings}))
    with backend.as_base() as view, backend.as_finetuned() as tuned:
        assert type(view.model).__name__ == specimen.class_name
        assert view_logits(view).equal(alone)
        assert view_logits(tuned).equal(expected)
        assert view.logprob_of("the sun", " rises") != tuned.logprob_of("the sun", " rises")
    assert backend.changes() == []
    backend.close()
