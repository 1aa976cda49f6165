"""Quantized bases: PEFT's numbers on both sides, one load for two adapters, and no false mutation errors.

bitsandbytes repacks 4-bit weights in the first pass on a CPU, and compressed-tensors unpacks them. So a model's weights
change when it first runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of
from tests.tiny import make_adapter, make_base, make_tokenizer, quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPT, ANSWER = "the sun", " rises in the east"


@pytest.fixture(autouse=True)
def quiet_libraries() -> Iterator[None]:
    with quiet():
        yield


def _by_transformers(base: Path, folder: Path, config: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)


def _nf4(base: Path, folder: Path) -> None:
    import torch
    import transformers

    config_class: Any = transformers.BitsAndBytesConfig
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    _by_transformers(base, folder, config_class(load_in_4bit=True, **settings))


def _int8(base: Path, folder: Path) -> None:
    import transformers

    config_class: Any = transformers.BitsAndBytesConfig
    _by_transformers(base, folder, config_class(load_in_8bit=True))


def _torchao(base: Path, folder: Path) -> None:
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    config_class: Any = transformers.TorchAoConfig
    _by_transformers(base, folder, config_class(quant_type=Int8WeightOnlyConfig()))


def _compressed(base: Path, folder: Path) -> None:
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings: Any = {"format": "pack-quantized", "quantization_status": "frozen"}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], **settings))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().abs().amax(1, keepdim=True) / 127
    compressor: Any = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


FORMATS: dict[str, Callable[[Path, Path], None]] = {
    "bitsandbytes nf4": _nf4,
    "bitsandbytes int8": _int8,
    "torchao int8": _torchao,
}


class Models:
    """A quantized base with two adapters, and the results of transformers and PEFT."""

    def __init__(self, folder: Path, quantize: Callable[[Path, Path], None]) -> None:
        plain = make_base(folder / "plain", hidden=64)
        self.base = folder / "quantized"
        quantize(plain, self.base)
        make_tokenizer(self.base)
        self.adapters = [make_adapter(folder / f"adapter{n}", plain, seed=n) for n in range(2)]
        self.alone = logits(*fresh(self.base))
        self.tuned = [logits(*fresh(self.base, adapter)) for adapter in self.adapters]


@pytest.fixture(scope="module", params=FORMATS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    with quiet():
        return Models(tmp_path_factory.mktemp("models"), FORMATS[request.param])


@pytest.fixture
def loads() -> list[str]:
    return []


@pytest.fixture
def backends(models: Models, loads: list[str]) -> Iterator[list[Any]]:
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name))
    built = [builder(spec_of(models.base, adapter)) for adapter in models.adapters]
    yield built
    for backend in built:
        backend.close()


@pytest.mark.parametrize("quantize", [*FORMATS.values(), _compressed], ids=[*FORMATS, "compressed-tensors"])
def test_a_base_alone_computes_what_transformers_computes_and_is_no_change(tmp_path: Path, quantize: Any) -> None:
    quantize(make_base(tmp_path / "plain", hidden=64), tmp_path / "quantized")
    make_tokenizer(tmp_path / "quantized")
    expected = logits(*fresh(tmp_path / "quantized"))
    backend = HFBuilder()(spec_of(tmp_path / "quantized"))
    with backend.as_base() as first, backend.as_base() as second:
        score = first.logprob_of(PROMPT, ANSWER)
        assert view_logits(first).equal(expected)
        assert view_logits(second).equal(expected)
        assert second.logprobs_of([(PROMPT, ANSWER)]) == [score]
    assert backend.changes() == []
    del first, second
    backend.close()
    assert backend.leak() is None


def test_both_adapters_and_the_base_compute_what_peft_computes_in_any_order(
    models: Models, backends: list[Any], loads: list[str]
) -> None:
    first, second = backends
    for _ in range(2):
        with first.as_base() as base, first.as_finetuned() as tuned, second.as_finetuned() as other:
            assert view_logits(base).equal(models.alone)
            scores = [view.logprob_of(PROMPT, ANSWER) for view in (base, tuned, other)]
            assert len(set(scores)) == 3
            assert view_logits(tuned).equal(models.tuned[0])
            assert view_logits(other).equal(models.tuned[1])
            assert [view.logprob_of(PROMPT, ANSWER) for view in (base, tuned, other)] == scores
    assert len(loads) == 1


def test_a_base_that_has_computed_takes_another_adapter(models: Models) -> None:
    builder = HFBuilder()
    plain = builder(spec_of(models.base))
    with plain.as_base() as base:
        base.logprob_of(PROMPT, ANSWER)
        assert view_logits(base).equal(models.alone)
    backend = builder(spec_of(models.base, models.adapters[0]))
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(models.tuned[0])
    backend.close()
    plain.close()


def test_computing_is_no_change_and_nothing_stays_in_memory(models: Models, backends: list[Any]) -> None:
    for backend in backends:
        with backend.as_base() as base, backend.as_finetuned() as tuned:
            for view in (base, tuned):
                view_logits(view)
                view.logprobs_of([(PROMPT, ANSWER), ("the moon", " sets")])
                view.generate(PROMPT, max_new_tokens=3)
        del base, tuned, view
        assert backend.changes() == []
    for backend in backends:
        backend.close()
        assert backend.leak() is None


def test_a_write_to_the_packed_weights_ends_with_its_test_or_is_found(models: Models, backends: list[Any]) -> None:
    import torch

    first, second = backends
    with first.as_base() as base, second.as_finetuned() as other:
        module = base.model.model.layers[0].self_attn.q_proj
        parts = (part for name, weight in module.named_parameters() for part in parts_of(weight, name))
        name, weight = next((name, part) for name, part in parts if not part.is_floating_point())
        with torch.no_grad():
            weight.data.zero_()
        if first.changes():
            assert first.changes() == [f"model.layers.0.self_attn.q_proj.{name}: contents changed"]
            assert second.changes() == first.changes()
        else:
            assert view_logits(other).equal(models.tuned[1])


def test_merged_into_a_quantized_base_an_adapter_gives_pefts_numbers(models: Models, loads: list[str]) -> None:
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name))
    backend = builder(spec_of(models.base, models.adapters))
    expected = _merged_by_hand(models)
    for _ in range(2):
        with backend.as_base() as plain, backend.as_finetuned() as tuned:
            assert view_logits(plain).equal(models.alone)
            assert view_logits(tuned).equal(expected)
            assert tuned.logprob_of(PROMPT, ANSWER) != plain.logprob_of(PROMPT, ANSWER)
        assert backend.changes() == []
    own, whole = (share.value.nbytes for share in reversed(backend._require().shares))
    assert own < whole
    assert len(loads) == 1
    backend.close()
    assert backend.leak() is None


def _merged_by_hand(models: Models) -> Any:
    from peft import PeftModel

    first, last = models.adapters
    model, tokenizer = fresh(models.base, first)
    return logits(PeftModel.from_pretrained(model.merge_and_unload(), str(last)).eval(), tokenizer)
