"""Each worker quantizes its own base: a quantized one is never written to a file for other workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from tests.quant import formats
from tests.quant.test_on_load import FORMATS
from tests.tiny import make_base, make_tokenizer
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.spec.model_spec import ModelSpec


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def _as_two_workers(spec: ModelSpec, run_folder: Path, expected: Any) -> None:
    for _ in range(2):
        backend = HFBuilder(share_weights=run_folder)(spec)
        with backend.as_base() as view:
            assert view_logits(view).equal(expected)
        backend.close()


@pytest.mark.parametrize("form", ["nf4", "int8", "torchao int8"])
def test_a_base_that_is_quantized_on_load_is_not_written(tmp_path: Path, run_folder: Path, form: str) -> None:
    base, (settings, made) = make_base(tmp_path / "base", hidden=64, dtype="bfloat16"), FORMATS[form]
    expected = logits(*fresh(base, quantization_config=made(settings)))
    _as_two_workers(spec_of(base, model_kwargs={"quantization_config": settings}), run_folder, expected)
    assert list(run_folder.iterdir()) == []
    HFBuilder(share_weights=run_folder)(spec_of(base)).close()
    assert list(run_folder.glob("*/*/model.safetensors"))  # without quantization, the same base is


@pytest.mark.parametrize("form", ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "gptq", "awq"])
def test_a_base_that_is_read_quantized_is_not_written_either(tmp_path: Path, run_folder: Path, form: str) -> None:
    base = tmp_path / "quantized"
    formats.FORMATS[form](make_base(tmp_path / "plain", hidden=64), base)
    make_tokenizer(base)
    expected = logits(*fresh(base, dtype="bfloat16"))
    _as_two_workers(spec_of(base, dtype="bf16"), run_folder, expected)  # its norms, stored in fp32, are converted
    assert list(run_folder.iterdir()) == []
