"""Which quantized models compute a text differently beside others; the classes have the names that torchao's have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway.backends.hf.scoring.alone import mixes_texts


def _made(name: str, **fields: Any) -> Any:
    return type(name, (SimpleNamespace,), {})(**fields)


TENSOR, ROW = _made("PerTensor"), _made("PerRow")
FP8, INT8 = "Float8DynamicActivationFloat8WeightConfig", "Int8DynamicActivationInt8WeightConfig"
NVFP4 = "NVFP4DynamicActivationNVFP4WeightConfig"


def _of(**fields: Any) -> Any:
    return SimpleNamespace(quantization_config=SimpleNamespace(**fields))


@pytest.mark.parametrize(
    ("kind", "mixes"),
    [
        (_made(FP8, granularity=[TENSOR, TENSOR]), True),
        (_made(FP8, granularity=TENSOR), True),
        (_made(FP8, granularity=None), True),
        (_made(FP8, granularity=[ROW, ROW]), False),
        (_made(INT8, granularity=TENSOR), True),
        (_made(INT8, granularity=[ROW, TENSOR]), False),
        (_made(INT8, granularity=None), False),
        (_made("Float8WeightOnlyConfig", granularity=TENSOR), False),
        (_made("Int8StaticActivationInt8WeightConfig", granularity=TENSOR), False),
        (_made("Float8DynamicActivationInt4WeightConfig"), False),
        (_made(NVFP4, use_dynamic_per_tensor_scale=True), True),
        (_made(NVFP4, use_dynamic_per_tensor_scale=False), False),
        (_made("FqnToConfig", fqn_to_config={"a": None, "b": _made(FP8, granularity=[TENSOR, TENSOR])}), True),
        (_made("ModuleFqnToConfig", module_fqn_to_config={"b": _made(FP8, granularity=[ROW, ROW])}), False),
        ("int8_weight_only", False),
    ],
)
def test_activations_of_torchao_with_one_scale_for_a_whole_pass_mix_its_texts(kind: Any, mixes: bool) -> None:
    assert mixes_texts(_of(quant_type=kind)) is mixes


@pytest.mark.parametrize(
    ("activations", "mixes"),
    [
        ({"dynamic": True, "strategy": "tensor"}, True),
        ({"dynamic": True, "strategy": "token"}, False),
        ({"dynamic": False, "strategy": "tensor"}, False),
        ({"dynamic": "local", "strategy": "tensor_group"}, False),
        (None, False),
    ],
)
def test_those_of_compressed_tensors_do_too(activations: dict[str, Any] | None, mixes: bool) -> None:
    scheme = SimpleNamespace(input_activations=activations and SimpleNamespace(**activations))
    inner = SimpleNamespace(config_groups={"group_0": scheme})
    assert mixes_texts(_of(quantization_config=inner)) is mixes


def test_a_model_without_such_a_quantization_mixes_nothing() -> None:
    assert mixes_texts(SimpleNamespace()) is False
    assert mixes_texts(SimpleNamespace(quantization_config=None)) is False
    assert mixes_texts(_of(quantization_config=None)) is False
    assert mixes_texts(_of(load_in_8bit=True, llm_int8_threshold=6.0)) is True
    assert mixes_texts(_of(load_in_8bit=True, llm_int8_threshold=0.0)) is False
