"""Embeddings are pooled as the model's own sentence-transformers configuration says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway import cache_key_for
from pytest_sway.backends.hf.heads import batches
from pytest_sway.errors import ScoringError, SpecError, SwayWarning
from tests.tiny import edit_weights, make_tokenizer
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.heads.models import (
    TEXTS,
    fresh_model,
    make_head_adapter,
    make_model,
    make_sentence_model,
)
from tests.unit.backends.hf.insides import engine_of, passes_of
from tests.unit.backends.hf.multimodal import SPECIMENS, make_multimodal

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that says nothing of how it pools."""
    return make_model(tmp_path_factory.mktemp("plain"), "bert", "AutoModel")


@pytest.fixture
def bert(plain: Path, tmp_path: Path) -> Path:
    return make_sentence_model(shutil.copytree(plain, tmp_path / "bert"))


_POOL: dict[str, Callable[[Any], Any]] = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
    "last": lambda states: states[-1],
    "max": lambda states: states.amax(0),
}


def _alone(model: Any, tokenizer: Any, texts: list[str], mode: str, *, normalize: bool = False) -> np.ndarray[Any, Any]:
    """Return the embedding of each text, from transformers' hidden states of the text alone."""
    import torch

    rows = []
    for text in texts:
        with torch.inference_mode():
            vector = _POOL[mode](model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0])
        rows.append(vector / vector.norm() if normalize else vector)
    return torch.stack(rows).numpy()


def test_the_models_own_configuration_decides(build: Any, bert: Path) -> None:
    with build(bert, task="embeddings").as_base() as view:
        passes = passes_of(view)
        found = view.embed(TEXTS)
        assert max(rows for rows, _ in passes) > len(TEXTS) // 2
    assert (found.dtype, found.shape) == (np.float32, (len(TEXTS), 32))
    assert np.allclose(found, _alone(*fresh_model(bert, "AutoModel"), TEXTS, "mean", normalize=True), atol=1e-5)


@pytest.mark.parametrize(
    ("said", "mode"),
    [("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last"), ("max_tokens", "max")],
)
def test_each_pooling_is_read_and_can_be_said(build: Any, plain: Path, tmp_path: Path, said: str, mode: str) -> None:
    folder = make_sentence_model(shutil.copytree(plain, tmp_path / "bert"), said, modules=())
    expected = _alone(*fresh_model(plain, "AutoModel"), TEXTS, mode)
    with build(folder, task="embeddings").as_base() as own, build(plain, task="embeddings").as_base() as asked:
        assert np.allclose(own.embed(TEXTS), expected, atol=1e-5)
        assert np.allclose(asked.embed(TEXTS, pooling=mode), expected, atol=1e-5)


def test_the_newer_form_of_the_configuration_is_read_too(build: Any, bert: Path) -> None:
    (bert / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    with build(bert, task="embeddings").as_base() as view:
        assert np.allclose(view.embed(TEXTS), view.embed(TEXTS, pooling="cls"))


def test_a_causal_models_body_pools_its_last_token(build: Any, base: Path, tmp_path: Path) -> None:
    folder = make_sentence_model(shutil.copytree(base, tmp_path / "base"), "lasttoken")
    with build(folder, task="embeddings").as_base() as view:
        found = view.embed(TEXTS)
    assert np.allclose(found, _alone(*fresh_model(base, "AutoModel"), TEXTS, "last", normalize=True), atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_the_encoder_of_t5_embeds_alone(build: Any, tmp_path: Path, kind: str) -> None:
    folder = make_sentence_model(make_model(tmp_path, kind, "AutoModelForSeq2SeqLM", ends=True))
    with build(folder, task="embeddings").as_base() as view:
        assert type(view.model).__name__ == f"{kind.upper()}EncoderModel"
        found = view.embed(TEXTS)
    expected = _alone(*fresh_model(folder, "AutoModelForTextEncoding"), TEXTS, "mean", normalize=True)
    assert np.allclose(found, expected, atol=1e-5)


def test_a_missing_pooler_is_no_fault(build: Any, bert: Path) -> None:
    edit_weights(
        bert, lambda tensors: {k: t for k, t in tensors.items() if "pooler" not in k}, file="model.safetensors"
    )
    with build(bert, task="embeddings").as_base() as view:
        assert view.embed(TEXTS).shape == (len(TEXTS), 32)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return make_head_adapter(folder, plain, "AutoModel", "FEATURE_EXTRACTION", targets=["query", "value"])


def test_an_adapters_task_type_decides_the_head(build: Any, bert: Path, plain: Path, adapter: Path) -> None:
    backend = build(bert, adapter, trust_remote_code=False)
    with backend.as_finetuned() as tuned, backend.as_base() as untuned:
        found = tuned.embed(TEXTS)
        assert not np.allclose(found, untuned.embed(TEXTS), atol=1e-3)
        assert type(tuned.model).__name__ == "PeftModelForFeatureExtraction"
    expected = _alone(*fresh_model(plain, "AutoModel", adapter), TEXTS, "mean", normalize=True)
    assert np.allclose(found, expected, atol=1e-5)


def test_a_configuration_in_the_adapters_folder_serves_both_sides(
    build: Any, plain: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = make_sentence_model(shutil.copytree(adapter, tmp_path / "adapter"), "cls_token", modules=())
    backend = build(plain, folder)
    with backend.as_finetuned() as tuned, backend.as_base() as untuned:
        assert np.allclose(untuned.embed(TEXTS), _alone(*fresh_model(plain, "AutoModel"), TEXTS, "cls"), atol=1e-5)
        expected = _alone(*fresh_model(plain, "AutoModel", adapter), TEXTS, "cls")
        assert np.allclose(tuned.embed(TEXTS), expected, atol=1e-5)


def test_both_sides_pass_the_preflight(build: Any, plain: Path, adapter: Path) -> None:
    assert build(plain, adapter).preflight_finite_check() == (True, "")


# --- the rest of the configuration ------------------------------------------------------------------------------------


def test_texts_are_cut_where_the_configuration_says(build: Any, bert: Path) -> None:
    make_sentence_model(bert, bert={"max_seq_length": 4, "do_lower_case": True})
    with build(bert, task="embeddings").as_base() as view:
        with pytest.warns(
            SwayWarning, match="1 of the prompts are too long: the model reads at most 4 .* their end, as"
        ):
            cut = view.embed(["THE SUN rises in the east"])
        assert np.array_equal(cut, view.embed(["the sun rises in"]))


@pytest.mark.parametrize(
    "files",
    [
        {"longest": 4, "bert": {"transformer_task": "feature-extraction"}},
        {"longest": 4},
        {"longest": 300, "bert": {"max_seq_length": 4}},
        {"longest": 3, "bert": {"max_seq_length": 4}},
    ],
)
def test_without_a_length_in_the_configuration_the_tokenizers_own_one_cuts(
    build: Any, bert: Path, files: dict[str, Any]
) -> None:
    make_sentence_model(bert, **files)
    with build(bert, task="embeddings").as_base() as view:
        for pooling in (None, "cls"):
            with pytest.warns(SwayWarning, match="the model reads at most 4 tokens .* their end, as"):
                cut = view.embed(["the sun rises in the east"], pooling=pooling)
            assert np.array_equal(cut, view.embed(["the sun rises in"], pooling=pooling))


@pytest.mark.filterwarnings("error::pytest_sway.SwayWarning")
@pytest.mark.parametrize("longest", [int(1e30), 0, 1000])
def test_a_tokenizer_that_states_no_shorter_length_cuts_nothing(build: Any, bert: Path, longest: int) -> None:
    text = " ".join(["the sun"] * 20)
    make_sentence_model(bert, longest=longest)
    with build(bert, task="embeddings").as_base() as view:
        found = view.embed([text])
    assert np.allclose(found, _alone(*fresh_model(bert, "AutoModel"), [text], "mean", normalize=True), atol=1e-5)


def test_a_cut_keeps_special_tokens_and_leaves_no_setting_that_could_cut_the_text_of_another_thread(
    build: Any, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, processors

    path, text = str(bert / "tokenizer.json"), "the sun rises in the east"
    rust = Tokenizer.from_file(path)
    template: Any = processors.TemplateProcessing
    rust.post_processor = template(single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)])
    rust.save(path)
    expected = fresh_model(bert, "AutoModel")[1](text, truncation=True, max_length=5)["input_ids"]
    make_sentence_model(bert, longest=5)
    with build(bert, task="embeddings").as_base() as view:
        tokenizer, settings = engine_of(view).tokenizer, list[str]()
        begin = tokenizer.set_truncation_and_padding

        def begin_as_told(**given: Any) -> None:
            settings.append(given["truncation_strategy"].value)
            begin(**given)

        monkeypatch.setattr(tokenizer, "set_truncation_and_padding", begin_as_told)
        with pytest.warns(SwayWarning, match="at most 5 tokens"):
            cut = view.embed([text])
        assert np.array_equal(cut, view.embed(["the sun rises"]))
        assert set(settings) == {"do_not_truncate"}
        assert list(batches.cut(tokenizer, text, 5).ids) == expected == [1, *expected[1:4], 2]


def test_the_default_prompt_comes_before_each_text(build: Any, bert: Path) -> None:
    with build(bert, task="embeddings").as_base() as view:
        expected = view.embed([f"hello {text}" for text in TEXTS])
    make_sentence_model(bert, transformers={"prompts": {"query": "hello "}, "default_prompt_name": "query"})
    with build(bert, task="embeddings").as_base() as view:
        assert np.allclose(view.embed(TEXTS), expected, atol=1e-6)


def test_a_pooling_that_is_said_replaces_the_configurations(build: Any, bert: Path) -> None:
    with build(bert, task="embeddings").as_base() as view:
        found = view.embed(TEXTS, pooling="last")
    assert np.allclose(found, _alone(*fresh_model(bert, "AutoModel"), TEXTS, "last", normalize=True), atol=1e-5)


@pytest.mark.parametrize("body", ["bert", "opt", "t5gemma", "qwen2_vl"])
def test_no_texts_have_no_embeddings_of_the_usual_size_without_a_pass(build: Any, tmp_path: Path, body: str) -> None:
    if body == "qwen2_vl":
        make_multimodal(tmp_path, next(specimen for specimen in SPECIMENS if str(specimen) == body))
    else:
        _make_body(tmp_path, body)
    with build(tmp_path, task="embeddings").as_base() as view:
        passes = passes_of(view)
        empty = view.embed([], pooling="mean")
        assert not passes
        one = view.embed(["a text"], pooling="mean")
    assert (empty.dtype, empty.shape) == (np.float32, (0, one.shape[1]))


def _make_body(folder: Path, body: str) -> None:
    """Save a body whose config tells the size of its hidden states in another way than most."""
    import transformers

    parts = {"vocab_size": make_tokenizer(folder), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    if body == "t5gemma":
        parts |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
        encoder = transformers.T5GemmaConfig(encoder=parts, decoder=parts)
        encoder.is_encoder_decoder = False
        transformers.T5GemmaEncoderModel(encoder).save_pretrained(folder)
    else:
        parts |= {"word_embed_proj_dim": 16, "ffn_dim": 32} if body == "opt" else {"intermediate_size": 64}
        auto: Any = transformers.AutoModel
        auto.from_config(transformers.AutoConfig.for_model(body, **parts)).save_pretrained(folder)


def test_the_encoder_that_a_config_names_is_loaded_alone(build: Any, tmp_path: Path) -> None:
    _make_body(tmp_path, "t5gemma")
    expected = _alone(*fresh_model(tmp_path, "AutoModelForTextEncoding"), TEXTS, "mean")
    with build(tmp_path, task="embeddings").as_base() as view:
        assert type(view.model).__name__ == "T5GemmaEncoderModel"
        assert np.allclose(view.embed(TEXTS, pooling="mean"), expected, atol=1e-5)


def test_a_model_whose_decoder_needs_a_text_of_its_own_is_refused(build: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "longt5", "AutoModel")
    what = r"is of the class LongT5Model, whose decoder must be given a text of its own.* Name an encoder, or a T5"
    with pytest.raises(SpecError, match=what):
        build(folder, task="embeddings")


@pytest.mark.parametrize("kind", ["bart", "mbart", "led"])
def test_a_model_that_gives_its_decoder_the_text_itself_is_served(build: Any, tmp_path: Path, kind: str) -> None:
    folder = make_model(tmp_path, kind, "AutoModel", ends=True)
    expected = _alone(*fresh_model(folder, "AutoModel"), TEXTS, "mean")
    with build(folder, task="embeddings").as_base() as view:
        assert np.allclose(view.embed(TEXTS, pooling="mean"), expected, atol=1e-5)


def test_another_pooling_is_another_backend(bert: Path) -> None:
    before = cache_key_for(spec_of(bert, task="embeddings"))
    make_sentence_model(bert, "cls_token", modules=())
    assert cache_key_for(spec_of(bert, task="embeddings")) != before


# --- what it can't answer ---------------------------------------------------------------------------------------------


def test_without_a_configuration_the_choices_are_named(build: Any, plain: Path) -> None:
    what = r"no configuration of sentence-transformers \(modules.json\).*pooling='mean'\), or 'cls', 'last', 'max'"
    with build(plain, task="embeddings").as_base() as view, pytest.raises(ScoringError, match=what):
        view.embed(TEXTS)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"modules": ("Dense", "Normalize")}, "has the module Dense in its modules.json"),
        ({"mode": ["cls_token", "mean_tokens"]}, "pools by cls and mean in its"),
        ({"mode": "mean_sqrt_len_tokens"}, "pools by pooling_mode_mean_sqrt_len_tokens in its"),
        (
            {
                "pooling": {"include_prompt": False},
                "transformers": {"prompts": {"q": "hello"}, "default_prompt_name": "q"},
            },
            "leaves its prompt out of the pooling",
        ),
        ({"bert": {"modality_config": {"message": {"method": "forward"}}}}, "puts texts into its chat template"),
    ],
)
def test_a_configuration_that_is_not_computed_is_told(
    build: Any, bert: Path, fields: dict[str, Any], text: str
) -> None:
    make_sentence_model(bert, **fields)
    with build(bert, task="embeddings").as_base() as view:
        with pytest.raises(ScoringError, match=text + r".*Say how to pool"):
            view.embed(TEXTS)
        assert view.embed(TEXTS, pooling="mean").shape == (len(TEXTS), 32)


def test_a_module_of_the_models_own_code_is_not_taken_for_the_usual_one(build: Any, bert: Path) -> None:
    modules = json.loads((bert / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (bert / "modules.json").write_text(json.dumps(modules))
    with build(bert, task="embeddings").as_base() as view, pytest.raises(ScoringError, match=r"custom_st\.Transformer"):
        view.embed(TEXTS)


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda view: view.embed(TEXTS, pooling="sum"), "there is no pooling 'sum'"),
        (lambda view: view.embed("the sun"), "expected a list of texts"),
        (lambda view: view.embed([("a", "b")]), "expected a text"),
        (lambda view: view.classify(TEXTS), "a model for embeddings .*it answers embed"),
        (lambda view: view.logprob_of("the", " sun"), "a model for embeddings .*it answers embed"),
    ],
)
def test_what_it_cannot_answer_is_refused(build: Any, bert: Path, ask: Any, text: str) -> None:
    with build(bert, task="embeddings").as_base() as view, pytest.raises(ScoringError, match=text):
        ask(view)


def test_a_configuration_that_cannot_be_read_is_named(build: Any, bert: Path) -> None:
    (bert / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(SpecError, match=r"1_Pooling/config\.json' cannot be read as JSON"):
        build(bert, task="embeddings")
