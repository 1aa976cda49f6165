"""Adapters of many types on quantized bases: PEFT's numbers, or an error that accuses neither adapter nor base."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.sharing.tensor_parts import scales_of
from pytest_sway.errors import AdapterMismatchError, BackendLoadError, BackendNotAvailableError
from tests.quant.test_on_load import FORMATS
from tests.tiny import edit_config, make_adapter, make_base, save_adapter
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path

PROMPT, ANSWER = "the sun", " rises in the east"
PROJECTIONS = ["q_proj", "v_proj"]
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("LoraConfig", {"target_modules": PROJECTIONS, "use_dora": True}),
    "a saved head": ("LoraConfig", {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head"]}),
    "a saved layer": ("LoraConfig", {"target_modules": PROJECTIONS, "modules_to_save": ["k_proj"]}),
    "PiSSA": ("LoraConfig", {"target_modules": PROJECTIONS, "init_lora_weights": "pissa"}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "VeRA": ("VeraConfig", {"target_modules": ["q_proj"], "r": 4}),
    "LoHa": ("LoHaConfig", {"target_modules": PROJECTIONS, "r": 2}),
    "HRA": ("HRAConfig", {"target_modules": PROJECTIONS, "r": 4}),
    "prefixes": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
}
SERVED = [
    *((form, kind) for form in ("nf4", "torchao int8") for kind in ("DoRA", "a saved head", "IA3", "VeRA", "prefixes")),
    *(("int8", kind) for kind in ("a saved head", "IA3", "VeRA", "LoHa", "HRA", "prefixes")),
]
REFUSED = [
    *(("nf4", kind) for kind in ("a saved layer", "PiSSA", "LoHa", "HRA")),
    *(("int8", kind) for kind in ("DoRA", "a saved layer", "PiSSA")),
    *(("torchao int8", kind) for kind in ("a saved layer", "PiSSA", "HRA")),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", hidden=64)


def _adapter(folder: Path, base: Path, kind: str) -> Path:
    import peft

    name, fields = TYPES[kind]
    return save_adapter(folder, base, getattr(peft, name)(task_type="CAUSAL_LM", **fields), scale=0.05)


@pytest.mark.parametrize(("form", "kind"), SERVED)
def test_an_adapter_of_any_type_computes_what_peft_computes(base: Path, tmp_path: Path, form: str, kind: str) -> None:
    adapter = _adapter(tmp_path, base, kind)
    settings, made = FORMATS[form]
    expected = logits(*fresh(base, adapter, quantization_config=made(settings)))
    backend = HFBuilder(score_cache=0)(spec_of(base, adapter, model_kwargs={"quantization_config": settings}))
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        score = tuned.logprob_of(PROMPT, ANSWER)
        assert view_logits(tuned).equal(expected)
        assert tuned.logprob_of(PROMPT, ANSWER) == score != plain.logprob_of(PROMPT, ANSWER)
        assert tuned.generate_many([PROMPT], max_new_tokens=3) == [tuned.generate(PROMPT, max_new_tokens=3)]
        assert len(tuned.rolling_logprobs([PROMPT, ANSWER])) == 2
    assert backend.changes() == []
    backend.close()


@pytest.mark.parametrize("kind", ["DoRA", "IA3", "a saved head"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_an_adapter_of_any_type_shares_the_weights_of_bitsandbytes_and_their_scales(
    base: Path, tmp_path: Path, form: str, kind: str
) -> None:
    if (form, kind) not in SERVED:
        kind = "LoHa"
    settings, _ = FORMATS[form]
    backend = HFBuilder()(spec_of(base, _adapter(tmp_path, base, kind), model_kwargs={"quantization_config": settings}))
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        places = [_places(view.model) for view in (plain, tuned)]
        assert places[0] == places[1]
        assert len(places[0]) == 14
    backend.close()


def _places(model: Any) -> list[list[int]]:
    """Return the addresses of each quantized weight and of what is beside it."""
    import bitsandbytes

    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)]
    assert all(getattr(layer, "quant_state", None) is getattr(layer.weight, "quant_state", None) for layer in layers)
    return [[part.data_ptr() for part in (layer.weight, *scales_of(layer.weight))] for layer in layers]


@pytest.mark.parametrize(("form", "kind"), REFUSED)
def test_an_adapter_that_peft_cannot_put_on_quantized_layers_is_not_accused(
    base: Path, tmp_path: Path, form: str, kind: str
) -> None:
    adapter, (settings, _) = _adapter(tmp_path, base, kind), FORMATS[form]
    method = settings.get("quant_method", "bitsandbytes")
    told = rf"^PEFT cannot put the adapter .* on layers that are quantized by {method}, .* It fits the same model"
    with pytest.raises(AdapterMismatchError, match=told):
        HFBuilder()(spec_of(base, adapter, model_kwargs={"quantization_config": settings}))


@pytest.mark.parametrize(("form", "part"), [("int8", ".SCB"), ("torchao int8", "_weight_scale")])
def test_a_quantized_base_that_does_not_run_is_accused_in_its_adapters_place(
    base: Path, tmp_path: Path, form: str, part: str
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    adapter, (settings, made) = _adapter(tmp_path / "adapter", base, "IA3"), FORMATS[form]
    model, tokenizer = fresh(base, quantization_config=made(settings))
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scales = {name: tensor[:3].clone() for name, tensor in tensors.items() if f"down_proj.{part.lstrip('.')}" in name}
    assert scales
    save_file(tensors | scales, path, metadata=metadata)
    told = r"^the base .*, which is quantized by .*, does not run, with the adapter .* or without: .* not the cause"
    with pytest.raises(BackendLoadError, match=told):
        HFBuilder()(spec_of(tmp_path / "base", adapter))


def test_an_adapter_of_another_model_is_accused_on_a_quantized_base_too(base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", hidden=32)
    adapter = edit_config(make_adapter(tmp_path / "adapter", other, use_dora=True), base_model_name_or_path=None)
    kwargs = {"quantization_config": FORMATS["nf4"][0]}
    with pytest.raises(AdapterMismatchError, match=r"does not fit the base .*Name the base that it was trained on"):
        HFBuilder()(spec_of(base, adapter, model_kwargs=kwargs))


def test_a_fault_of_an_adapters_config_is_named_on_a_quantized_base_too(base: Path, tmp_path: Path) -> None:
    adapter = edit_config(make_adapter(tmp_path, base), r="four")
    with pytest.raises(Exception, match="r = 'four'"):
        HFBuilder()(spec_of(base, adapter, model_kwargs={"quantization_config": FORMATS["nf4"][0]}))


@pytest.mark.parametrize("form", [None, "nf4"])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_told_that_it_needs_a_gpu(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str | None, bits: int
) -> None:
    """PEFT quantizes the base for it on a GPU, also with bitsandbytes and scipy."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
    assert find_spec("bitsandbytes")
    assert find_spec("scipy")
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": bits, "loftq_iter": 1}}
    adapter = edit_config(make_adapter(tmp_path, base), **loftq)
    kwargs = None if form is None else {"quantization_config": FORMATS[form][0]}
    told = r"^the adapter .* needs what this environment lacks: .*CUDA.* It is needed because .* init_lora_weights = '"
    with pytest.raises(BackendNotAvailableError, match=told):
        HFBuilder()(spec_of(base, adapter, model_kwargs=kwargs))


def test_a_model_that_needs_the_values_of_weights_is_not_accused_either(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def needing_values(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert float(self.embed_tokens.weight.sum()) != 0  # fails without weights
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", needing_values)
    adapter = _adapter(tmp_path, base, "LoHa")
    with pytest.raises(AdapterMismatchError, match=r"^PEFT cannot put the adapter .* It fits the same model"):
        HFBuilder()(spec_of(base, adapter, model_kwargs={"quantization_config": FORMATS["nf4"][0]}))
