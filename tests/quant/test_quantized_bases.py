"""Quantized bases: PEFT's numbers on both sides, one load for two adapters, and no false mutation errors.

bitsandbytes repacks 4-bit weights in the first pass on a CPU, and compressed-tensors unpacks them. So a model's weights
change when it first runs.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of
from pytest_sway.errors import AdapterMismatchError, SpecError
from tests.quant.formats import FORMATS, compressed, loading
from tests.tiny import make_adapter, make_base, make_tokenizer, quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_sway.spec.model_spec import ModelSpec

PROMPT, ANSWER = "the sun", " rises in the east"


class Models:
    """A quantized base with two adapters, and the results of transformers and PEFT."""

    def __init__(self, folder: Path, name: str) -> None:
        self.format = name
        from transformers.quantizers.auto import AutoQuantizationConfig

        plain = make_base(folder / "plain", hidden=64)
        self.base = folder / "quantized"
        FORMATS[name](plain, self.base)
        make_tokenizer(self.base)
        self.kwargs = loading(name)
        self.adapters = [make_adapter(folder / f"adapter{n}", plain, seed=n) for n in range(2)]
        self._loaded = {name: AutoQuantizationConfig.from_dict(dict(value)) for name, value in self.kwargs.items()}
        self.alone = logits(*self.fresh())
        self.tuned = [logits(*self.fresh(adapter)) for adapter in self.adapters]

    def fresh(self, adapter: Path | None = None) -> tuple[Any, Any]:
        return fresh(self.base, adapter, **self._loaded)

    def spec(self, adapter: int | None = None) -> ModelSpec:
        return spec_of(self.base, None if adapter is None else self.adapters[adapter], model_kwargs=self.kwargs)


@pytest.fixture(scope="module", params=FORMATS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    with quiet():
        return Models(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture
def loads() -> list[str]:
    return []


@pytest.fixture
def backends(models: Models, loads: list[str]) -> Iterator[list[Any]]:
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name))
    built = [builder(models.spec(n)) for n in range(2)]
    yield built
    for backend in built:
        backend.close()


@pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS)
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


def test_the_size_is_known_before_the_load(models: Models) -> None:
    builder = HFBuilder()
    plan = builder.check(models.spec(0))
    backend = builder.build(plan)
    assert plan.sizes is not None
    assert plan.sizes.keys() == backend.sizes().keys()
    for part, size in backend.sizes().items():
        assert plan.sizes[part] == pytest.approx(size, rel=0.03)
    backend.close()


def test_an_adapter_on_packed_layers_is_refused_with_the_form_that_works(tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain", hidden=64)
    compressed(plain, tmp_path / "packed")
    for file in plain.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "packed")
    adapter = make_adapter(tmp_path / "adapter", plain)
    with pytest.raises(AdapterMismatchError, match=r"^the base .* is packed by compressed-tensors, .*'run_compre"):
        HFBuilder().check(spec_of(tmp_path / "packed", adapter))


def test_a_base_that_has_computed_takes_another_adapter(models: Models) -> None:
    builder = HFBuilder()
    plain = builder(models.spec())
    with plain.as_base() as base:
        base.logprob_of(PROMPT, ANSWER)
        assert view_logits(base).equal(models.alone)
    backend = builder(models.spec(0))
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
        parts = (part for name, weight in _weights(module) for part in parts_of(weight, name))
        name, weight = min(parts, key=lambda part: part[1].is_floating_point())
        with torch.no_grad():
            weight.data.zero_()
        if first.changes():
            assert first.changes() == [f"model.layers.0.self_attn.q_proj.{name}: contents changed"]
            assert second.changes() == first.changes()
        else:
            assert view_logits(other).equal(models.tuned[1])


def _weights(module: Any) -> list[tuple[str, Any]]:
    return [*module.named_parameters(), *module.named_buffers()]


def test_merged_into_a_quantized_base_an_adapter_gives_pefts_numbers_where_peft_merges(
    models: Models, loads: list[str]
) -> None:
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name))
    spec = spec_of(models.base, models.adapters, model_kwargs=models.kwargs)
    if models.format in ("gptq", "awq"):
        with pytest.raises(SpecError, match=r"it cannot be merged: PEFT says: .*\. Name it last, or alone\.$"):
            builder(spec)
        return
    backend = builder(spec)
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
    model, tokenizer = models.fresh(first)
    return logits(PeftModel.from_pretrained(model.merge_and_unload(), str(last)).eval(), tokenizer)


def test_the_models_of_two_adapters_have_objects_of_their_own_on_the_scales_of_nf4(tmp_path: Path) -> None:
    models = Models(tmp_path, "bitsandbytes nf4")
    builder = HFBuilder()
    first, second = builder(models.spec(0)), builder(models.spec(1))
    with first.as_base() as base, first.as_finetuned() as tuned, second.as_finetuned() as other:
        layers = [[m for m in view.model.modules() if hasattr(m, "quant_state")] for view in (base, tuned, other)]
        assert len(layers[0]) == len(layers[1]) == len(layers[2]) == 14
        for same in zip(*layers, strict=True):
            states = [layer.weight.quant_state for layer in same]
            assert all(layer.quant_state is state for layer, state in zip(same, states, strict=True))
            assert len({id(state) for state in states}) == 3
            assert len({state.absmax.data_ptr() for state in states}) == 1
            assert all(layer.weight.module is layer for layer in same)
    assert (first.changes(), second.changes()) == ([], [])
    first.close()
    second.close()


@pytest.mark.parametrize("kind", ["bitsandbytes nf4", "bitsandbytes int8"])
def test_a_write_to_one_packed_number_is_a_change(tmp_path: Path, kind: str) -> None:
    import torch

    models = Models(tmp_path, kind)
    backend = HFBuilder()(models.spec(0))
    with backend.as_finetuned() as tuned, torch.no_grad():
        layer = next(module.base_layer for module in tuned.model.modules() if hasattr(module, "base_layer"))
        layer.weight[1] += 1  # a sample of the numbers may not have it
    (line,) = backend.changes()
    assert line.endswith(".weight: contents changed")
    backend.close()


def test_a_write_to_the_scales_of_nf4_is_a_change(tmp_path: Path) -> None:
    models = Models(tmp_path, "bitsandbytes nf4")
    backend = HFBuilder()(models.spec(0))
    with backend.as_finetuned() as tuned:
        layer = next(module for module in tuned.model.modules() if hasattr(module, "quant_state"))
        layer.weight.quant_state.absmax.mul_(2)
    (line,) = backend.changes()
    assert line.endswith(".weight (scales, 1): contents changed")
    backend.close()
