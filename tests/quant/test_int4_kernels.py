"""GPTQ and AWQ: the kernel is chosen in ``model_kwargs``, and one that repacks in its first pass changes no numbers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from tests.quant.formats import FORMATS
from tests.tiny import make_adapter, make_base
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.spec.model_spec import ModelSpec

PROMPT, ANSWER = "the sun", " rises in the east"
KERNELS = {"gptq": ("torch_fused", "TorchFusedLinear"), "awq": ("torch_awq", "AwqTorchLinear")}
REPACKING = {"gptq": "torch_fused", "awq": "torch_fused_awq"}
"""They compute with ATen's operations, which every CPU has."""


@pytest.fixture(scope="module", params=["gptq", "awq"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base whose files name no kernel, as those on the hub do not."""
    folder = tmp_path_factory.mktemp("models")
    FORMATS[method](make_base(folder / "plain", hidden=64), folder / method)
    config = folder / method / "config.json"
    fields = json.loads(config.read_text())
    del fields["quantization_config"]["backend"]
    config.write_text(json.dumps(fields))
    return folder / method


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    return [make_adapter(base.parent / f"adapter{n}", base.parent / "plain", seed=n) for n in range(2)]


def _spec(base: Path, adapter: Path, method: str, kernel: str, dtype: str) -> ModelSpec:
    settings = {"quant_method": method, "bits": 4, "backend": kernel}
    return spec_of(base, adapter, dtype=dtype, model_kwargs={"quantization_config": settings})


def _fresh(base: Path, adapter: Path | None, method: str, kernel: str, dtype: str) -> Any:
    from transformers.quantizers.auto import AutoQuantizationConfig

    settings = AutoQuantizationConfig.from_dict({"quant_method": method, "bits": 4, "backend": kernel})
    return logits(*fresh(base, adapter, dtype=dtype, quantization_config=settings))


def test_the_kernel_that_model_kwargs_name_computes(base: Path, adapters: list[Path], method: str) -> None:
    kernel, layer = KERNELS[method]
    backend = HFBuilder()(_spec(base, adapters[0], method, kernel, "fp32"))
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert type(plain.model.model.layers[0].self_attn.q_proj).__name__ == layer
        assert view_logits(plain).equal(_fresh(base, None, method, kernel, "float32"))
        assert view_logits(tuned).equal(_fresh(base, adapters[0], method, kernel, "float32"))
    backend.close()


def test_a_kernel_that_repacks_weights_in_its_first_pass_computes_as_on_a_fresh_model(
    base: Path, adapters: list[Path], method: str
) -> None:
    kernel, loads = REPACKING[method], list[str]()
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name))
    one, other = (builder(_spec(base, adapter, method, kernel, "bf16")) for adapter in adapters)
    expected = [_fresh(base, adapter, method, kernel, "bfloat16") for adapter in (None, *adapters)]
    for _ in range(2):
        with one.as_base() as plain, one.as_finetuned() as tuned, other.as_finetuned() as third:
            for view, right in zip((plain, tuned, third), expected, strict=True):
                assert view_logits(view).equal(right)
                view.logprobs_of([(PROMPT, ANSWER), ("the moon", " sets")])
                view.generate(PROMPT, max_new_tokens=2)
        assert one.changes() == other.changes() == []
    del plain, tuned, third, view
    for backend in (one, other):
        backend.close()
        assert backend.leak() is None
    assert len(loads) == 1
