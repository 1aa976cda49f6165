"""A base that is not causal, or computes NaN, is refused at its load, or at its first pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import AdapterMismatchError, BackendLoadError, ScoringError, SpecError, WeightsError
from tests.tiny import TEXT, edit_config, edit_weights, make_adapter, make_base, make_tokenizer, quiet, save_adapter
from tests.unit.backends.hf.insides import bases_in, passes_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_sway.backends.hf.builder import HFBuilder

_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "electra": {**_ENCODER, "embedding_size": 32},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "init_std": 0.2, "embed_init_std": 0.2},
}


def _make(folder: Path, kind: str, **fields: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = {"vocab_size": make_tokenizer(folder), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class: Any = AutoModelForCausalLM
        model_class.from_config(AutoConfig.for_model(kind, **tokens, **fields)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused(build: Any, tmp_path: Path, kind: str, dtype: str) -> None:
    folder = _make(tmp_path, kind, **ENCODERS[kind])
    with pytest.raises(
        SpecError, match=rf"the base '{folder}' is not a causal language model: in its \w+, later tokens"
    ):
        build(folder, dtype=dtype)


def test_an_encoder_that_was_made_a_decoder_is_served(build: Any, tmp_path: Path) -> None:
    with build(_make(tmp_path, "bert", is_decoder=True, **_ENCODER)).as_base() as view:
        assert view.logprob_of("the sun", " rises") < 0


def test_an_encoder_is_no_fine_tuned_model_either(build: Any, base: Path, tmp_path: Path) -> None:
    folder = _make(tmp_path, "bert", **_ENCODER)
    with pytest.raises(SpecError, match=rf"the fine-tuned model '{folder}' is not a causal language model"):
        build(base, finetuned=folder)


def test_a_base_is_tried_once_whatever_the_number_of_its_adapters(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    with build(base).as_base() as view:
        passes = passes_of(view)
        for folder in (adapter, other_adapter):
            build(base, folder)
        assert passes == []


def test_an_encoder_whose_trees_are_loaded_anew_is_refused_where_it_first_computes(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sway.backends.hf.model.pristine.shares_objects", lambda tree, original: True)
    folder = _make(tmp_path / "base", "roberta", **ENCODERS["roberta"])
    with quiet():
        adapter = make_adapter(tmp_path / "adapter", folder, targets=("query",))
    backend = build(folder, adapter)
    for opened in (backend.as_finetuned, backend.as_base, backend.as_base):
        with opened() as view, pytest.raises(SpecError, match=rf"the base '{folder}' is not a causal language model"):
            view.logprob_of("the sun", " rises")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_with_weights_that_are_no_numbers_is_refused_by_their_names(
    build: Any, builder: HFBuilder, tmp_path: Path, value: float
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value

    folder = edit_weights(make_base(tmp_path), change, file="model.safetensors")
    with pytest.raises(WeightsError, match=r"NaN or infinite values in 1 of its \d+ tensors \(model.layers.1.mlp"):
        build(folder)
    assert bases_in(builder) == []


def _infinite_for_one_word(tensors: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"][64] = float("nan")  # the trial does not use this token


def _huge(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if "up_proj" in name or "down_proj" in name:
            tensor.fill_(1e38)


ANSWERS: list[Callable[[Any], object]] = [
    lambda view: view.logprob_of(TEXT, " red"),
    lambda view: view.rolling_logprobs([TEXT, "the cat"]),
    lambda view: view.next_token_dist(TEXT),
    lambda view: view.generate(TEXT, max_new_tokens=2),
    lambda view: view.generate_many([TEXT, "the cat"], max_new_tokens=2, temperature=1.0),
]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            _infinite_for_one_word,
            r"the model computes NaN: 1 of its \d+ weights have NaN .*\(model.embed_tokens.weight",
        ),
        (_huge, "the model computes NaN, though all of its weights are finite: an intermediate result is too"),
    ],
)
@pytest.mark.parametrize("ask", ANSWERS, ids=["pair", "rolling", "next", "generate", "sample"])
def test_what_the_load_cannot_show_is_an_error_of_the_first_answer_that_is_no_number(
    build: Any, tmp_path: Path, change: Any, sentence: str, ask: Callable[[Any], object]
) -> None:
    folder = edit_weights(make_base(tmp_path), change, file="model.safetensors")
    with build(folder).as_base() as view, pytest.raises(ScoringError, match=sentence):
        ask(view)


@pytest.mark.parametrize("value", [1e38, -3e38])
def test_a_lora_pair_whose_product_is_too_large_is_refused(
    build: Any, base: Path, tmp_path: Path, value: float
) -> None:
    adapter = make_adapter(tmp_path, base)
    edit_weights(adapter, lambda tensors: {name: tensor.fill_(value) for name, tensor in tensors.items()})
    with pytest.raises(
        AdapterMismatchError, match=r"weights of up to \d\.0e\+38 in .* scaled by 2\.0e\+00, and their product"
    ):
        build(base, adapter)


def test_a_scaling_that_is_too_large_is_refused(build: Any, base: Path, tmp_path: Path) -> None:
    adapter = edit_config(make_adapter(tmp_path, base), lora_alpha=1e300)
    with pytest.raises(
        AdapterMismatchError, match=r"scaled by 2\.5e\+299, and their product .* its lora_alpha is wrong"
    ):
        build(base, adapter)


def test_an_adapter_of_another_kind_that_makes_nan_is_refused(build: Any, base: Path, tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"])
    adapter = save_adapter(tmp_path, base, config)
    edit_weights(adapter, lambda tensors: {name: tensor.fill_(1e38) for name, tensor in tensors.items()})
    with pytest.raises(AdapterMismatchError, match=r"makes the base '.*' compute NaN for"):
        build(base, adapter)


def test_a_view_that_is_scaled_too_far_says_so(build: Any, base: Path, adapter: Path) -> None:
    with (
        build(base, adapter).as_scaled_adapter(1e38) as view,
        pytest.raises(ScoringError, match="its weights or an adapter's scaling are far too large"),
    ):
        view.logprob_of(TEXT, " red")


def test_a_number_of_the_config_by_which_a_base_computes_nan_is_named(build: Any, tmp_path: Path) -> None:
    named = r"computes NaN.* config.json is wrong \(that of '.*' has rms_norm_eps = -0.5"
    with build(make_base(tmp_path, rms_norm_eps=-0.5)).as_base() as view, pytest.raises(ScoringError, match=named):
        view.logprob_of("the sun", " rises")


def test_a_base_that_does_not_run_is_named_in_its_adapters_place(
    build: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import IA3Config
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    adapter = save_adapter(tmp_path, base, config)

    def broken(*args: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(LlamaMLP, "forward", broken)
    told = r"^the base .* does not run, with the adapter .* or without: RuntimeError: no kernel\. So the adapter is not"
    with pytest.raises(BackendLoadError, match=told) as caught:
        build(base, adapter)
    assert not caught.value.permanent
