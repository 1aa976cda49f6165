"""Bases that are quantized on load, by ``model_kwargs``: the numbers of transformers and PEFT with the same."""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.errors import BackendNotAvailableError, SpecError
from tests.tiny import make_adapter, make_base, quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_sway.spec.model_spec import ModelSpec

PROMPT, ANSWER = "the sun", " rises in the east"
TEXTS = [
    (PROMPT, ANSWER),
    ("the moon", " sets in the west ."),
    ("red cat", " sat"),
    ("it is", " that was for on as with"),
]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}
TORCHAO = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}


def _bitsandbytes(settings: dict[str, Any]) -> Any:
    import transformers

    config_class: Any = transformers.BitsAndBytesConfig
    return config_class(**settings)


def _torchao(_settings: dict[str, Any]) -> Any:
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig

    config_class: Any = transformers.TorchAoConfig
    return config_class(quant_type=Int8WeightOnlyConfig())


FORMATS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]] = {
    "nf4": (NF4, _bitsandbytes),
    "nf4 with nested scales": ({**NF4, "bnb_4bit_use_double_quant": True}, _bitsandbytes),
    "fp4": ({"load_in_4bit": True}, _bitsandbytes),
    "int8": (INT8, _bitsandbytes),
    "torchao int8": (TORCHAO, _torchao),
    "torchao int8, as older versions name it": ({**TORCHAO, "quant_type": "int8_weight_only"}, _torchao),
}


class Models:
    """A base with two adapters, how it is quantized, and what transformers and PEFT compute then."""

    def __init__(self, base: Path, adapters: list[Path], settings: dict[str, Any], made: Any) -> None:
        self.base, self.adapters, self.settings = base, adapters, settings
        self.alone = logits(*fresh(base, quantization_config=made))
        self.tuned = [logits(*fresh(base, adapter, quantization_config=made)) for adapter in adapters]

    def spec(self, adapter: int | None = None, **fields: Any) -> ModelSpec:
        files = None if adapter is None else self.adapters[adapter]
        return spec_of(self.base, files, model_kwargs={"quantization_config": self.settings}, **fields)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", hidden=64)


@pytest.fixture(scope="module")
def adapters(base: Path) -> list[Path]:
    return [make_adapter(base.parent / f"adapter{n}", base, seed=n) for n in range(2)]


@pytest.fixture(scope="module", params=FORMATS)
def models(request: pytest.FixtureRequest, base: Path, adapters: list[Path]) -> Models:
    settings, made = FORMATS[request.param]
    with quiet():
        return Models(base, adapters, settings, made(settings))


def test_both_adapters_and_the_base_compute_what_peft_computes_on_one_load(models: Models) -> None:
    loads: list[str] = []
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name))
    built = [builder(models.spec(n)) for n in range(2)]
    for _ in range(2):
        with built[0].as_base() as alone, built[0].as_finetuned() as tuned, built[1].as_finetuned() as other:
            assert alone.model.device.type == "cpu"
            scores = [view.logprob_of(PROMPT, ANSWER) for view in (alone, tuned, other)]
            assert view_logits(alone).equal(models.alone)
            assert view_logits(tuned).equal(models.tuned[0])
            assert view_logits(other).equal(models.tuned[1])
            assert [view.logprob_of(PROMPT, ANSWER) for view in (alone, tuned, other)] == scores
    del alone, tuned, other
    for backend in built:
        assert backend.changes() == []
        backend.close()
        assert backend.leak() is None
    assert len(loads) == 1


def test_an_adapter_on_a_base_that_has_computed_is_as_on_a_fresh_one(models: Models) -> None:
    """PEFT itself gives other numbers where bitsandbytes has repacked the weights in a pass on a CPU."""
    builder = HFBuilder()
    plain = builder(models.spec())
    with plain.as_base() as alone:
        alone.logprob_of(PROMPT, ANSWER)
        assert view_logits(alone).equal(models.alone)
    backend = builder(models.spec(0))
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(models.tuned[0])
    backend.close()
    plain.close()


@pytest.mark.parametrize("settings", [NF4, {"load_in_4bit": True}], ids=["nf4", "fp4"])
def test_peft_itself_goes_wrong_on_a_base_that_has_computed_where_it_is_repacked(
    base: Path, adapters: list[Path], settings: dict[str, Any]
) -> None:
    """This is why adapters go on weights that have never run; where it fails, they need not any more."""
    from bitsandbytes.functional import has_avx512bf16
    from peft import PeftModel

    made = _bitsandbytes(settings)
    expected = logits(*fresh(base, adapters[0], quantization_config=made))
    model, tokenizer = fresh(base, quantization_config=made)
    logits(model, tokenizer)
    found = logits(PeftModel.from_pretrained(model, str(adapters[0])).eval(), tokenizer)
    if has_avx512bf16():
        assert not (found - expected).abs().max() < 1  # garbage may be NaN
    else:
        assert found.equal(expected)


def test_the_size_is_known_before_the_load(models: Models) -> None:
    builder = HFBuilder()
    plan = builder.check(models.spec(0))
    backend = builder.build(plan)
    assert plan.sizes is not None
    assert plan.sizes.keys() == backend.sizes().keys()
    for part, size in backend.sizes().items():
        assert plan.sizes[part] == pytest.approx(size, rel=0.02)
    backend.close()


def test_the_base_beside_itself_quantized_shows_what_quantizing_changes(models: Models) -> None:
    kwargs = {"quantization_config": models.settings}
    backend = HFBuilder()(spec_of(models.base, finetuned=models.base, finetuned_model_kwargs=kwargs))
    with backend.as_base() as full, backend.as_finetuned() as quantized:
        assert view_logits(full).equal(logits(*fresh(models.base)))
        assert view_logits(quantized).equal(models.alone)
        assert full.logprob_of(PROMPT, ANSWER) != quantized.logprob_of(PROMPT, ANSWER)
    backend.close()


@pytest.mark.parametrize("adapter", [None, 0])
def test_texts_of_llm_int8_go_alone(base: Path, adapters: list[Path], adapter: int | None) -> None:
    files = None if adapter is None else adapters[adapter]
    kwargs = {"quantization_config": INT8}
    backend = HFBuilder(score_cache=0)(spec_of(base, files, model_kwargs=kwargs))
    prompts = [prompt for prompt, _ in TEXTS]
    with backend.as_base() if files is None else backend.as_finetuned() as view:
        assert view.logprobs_of(TEXTS) == [view.logprob_of(*text) for text in TEXTS]
        rolling = [each.logprobs.tolist() for each in view.rolling_logprobs(prompts)]
        assert rolling == [view.rolling_logprob(prompt).logprobs.tolist() for prompt in prompts]
        together = view.generate_many(prompts, max_new_tokens=4)
        assert together == [view.generate(prompt, max_new_tokens=4) for prompt in prompts]
    backend.close()


def test_llm_int8_logs_a_line_per_layer_in_a_tests_own_passes_only(
    base: Path, adapters: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    backend = HFBuilder()(spec_of(base, adapters[0], model_kwargs={"quantization_config": INT8}))
    with backend.as_base() as alone, backend.as_finetuned() as tuned:
        for view in (alone, tuned):
            view.logprobs_of(TEXTS)
            view.generate(PROMPT, max_new_tokens=2)
        assert "MatMul8bitLt" not in caplog.text
        view_logits(tuned)
        assert "MatMul8bitLt" in caplog.text
    backend.close()


def test_a_text_of_llm_int8_depends_on_the_others_in_its_pass(base: Path) -> None:
    """This is why; where it fails, texts need not go alone any more."""
    import torch

    model, tokenizer = fresh(base, quantization_config=_bitsandbytes(INT8))
    texts = [tokenizer("".join(text))["input_ids"][:6] for text in (TEXTS[0], TEXTS[3])]
    with torch.inference_mode():
        together = model(torch.tensor(texts)).logits[0]
        alone = model(torch.tensor(texts[:1])).logits[0]
    assert (together - alone).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [NF4, TORCHAO], ids=["nf4", "torchao"])
def test_computing_in_many_ways_is_no_change(base: Path, adapters: list[Path], settings: Any) -> None:
    kwargs = {"quantization_config": settings}
    built = [HFBuilder()(spec_of(base, adapter, model_kwargs=kwargs)) for adapter in adapters]
    for _ in range(10):
        for backend in built:
            with backend.as_base() as alone, backend.as_finetuned() as tuned:
                for view in (alone, tuned):
                    view.logprobs_of(TEXTS)
                    view.generate(PROMPT, max_new_tokens=2)
            assert backend.changes() == []
    for backend in built:
        backend.close()


def test_fp8_needs_a_gpu_to_be_quantized_on_load_and_says_so(base: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    sentence = (
        f'the model {str(base)!r} cannot be loaded with model_kwargs = {{"quantization_config": {{"quant_method":'
    )
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)} .* GPU .* name a model whose files are quantized\\.$"):
        HFBuilder()(spec_of(base, model_kwargs={"quantization_config": {"quant_method": "fp8"}}))


INT4 = {"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig", "quant_type_kwargs": {"group_size": 32}}
_NEEDS_MSLK = (
    r"^the model .* is quantized by torchao in a format that computes with the package 'mslk', not installed here: .*"
    r"Install it as torchao says, or take another format: the table of reference/quantized\.md"
)


def test_int4_of_torchao_says_which_package_it_lacks(base: Path) -> None:
    with pytest.raises(BackendNotAvailableError, match=_NEEDS_MSLK):
        HFBuilder()(spec_of(base, model_kwargs={"quantization_config": INT4}))


def test_files_in_int4_of_torchao_say_which_package_they_lack(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers
    from torchao.quantization import Int4WeightOnlyConfig

    def quantized(weight: Any, group: int) -> tuple[Any, Any, Any]:
        scales = torch.ones(weight.shape[1] // group, weight.shape[0])
        return weight.round().to(torch.int8), scales, torch.zeros_like(scales)

    int4: Any = import_module("torchao.quantization.quantize_.workflows.int4.int4_tensor")
    with monkeypatch.context() as as_mslk:
        as_mslk.setattr(int4, "int4_row_quantize_zp", quantized)
        as_mslk.setattr(int4, "pack_int4", lambda values: values[:, ::2].contiguous())
        config_class: Any = transformers.TorchAoConfig
        model, tokenizer = fresh(base, quantization_config=config_class(quant_type=Int4WeightOnlyConfig(group_size=32)))
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    backend = HFBuilder()(spec_of(tmp_path))
    with backend.as_base() as view, pytest.raises(BackendNotAvailableError, match=_NEEDS_MSLK):
        view.logprob_of(PROMPT, ANSWER)
    backend.close()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt key": ({"load_in_4bit": True, "bnb4bit_quant_type": "nf4"}, "Did you mean 'bnb_4bit_quant_type'?"),
    "torchao's key": (
        {"load_in_4bit": True, "quant_type": "nf4"},
        "has 'quant_type', which bitsandbytes does not have",
    ),
    "an unknown type": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "bitsandbytes has 'nf4' and 'fp4'."),
    "a misspelt flag": ({"load_in4bit": True}, "names no format. It needs 'load_in_4bit': True"),
    "a short dtype": (
        {**NF4, "bnb_4bit_compute_dtype": "bf16"},
        "no attribute 'bf16'. Write 'bnb_4bit_compute_dtype': 'bfloat16'.",
    ),
    "no flag": ({"quant_method": "bitsandbytes"}, "names no format. It needs 'load_in_4bit': True"),
}


@pytest.mark.parametrize(("settings", "sentence"), WRONG.values(), ids=WRONG)
def test_settings_that_transformers_would_ignore_are_refused(
    base: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(sentence)):
        HFBuilder()(spec_of(base, model_kwargs={"quantization_config": settings}))


@pytest.mark.parametrize("settings", [INT8, {**NF4, "bnb_4bit_quant_type": "fp4"}, TORCHAO], ids=str)
def test_files_that_are_quantized_already_are_not_said_to_be_quantized_in_another_way(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model, tokenizer = fresh(base, quantization_config=_bitsandbytes(NF4))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"are quantized by bitsandbytes already.* or name the model without"):
        HFBuilder()(spec_of(tmp_path, model_kwargs={"quantization_config": settings}))
    for same, label in ((NF4, "nf4"), ({"load_in_4bit": True}, "4-bit")):  # the files' own type, whatever it is
        backend = HFBuilder()(spec_of(tmp_path, model_kwargs={"quantization_config": same}))
        assert str(backend.spec).endswith(f"({label})")
        with backend.as_base() as view:
            assert view_logits(view).equal(logits(*fresh(tmp_path)))
        backend.close()
