"""Multimodal bases are asked for text: by the class that their config names, with adapters of any of their classes."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.loading.classes import text_parts
from pytest_sway.errors import AdapterMismatchError, SpecError, SwayWarning
from tests.tiny import TEXT, WORDS, edit_config, edit_weights, make_tokenizer, prune, quiet, save_noise, save_tiny
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.families import TEXT as TEXT_FIELDS
from tests.unit.backends.hf.families import VISION
from tests.unit.backends.hf.insides import base_in
from tests.unit.backends.hf.multimodal import (
    KNOWN,
    PAGE,
    SPECIMENS,
    Specimen,
    make_multimodal,
    page,
    plain_model,
    text_alone,
    text_model,
    train,
    with_adapter,
)
from tests.unit.backends.hf.zoo import TRANSFORMERS_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.backends.hf.backend import HFBackend

TEXTS = ["the cat sat", " ".join(WORDS[:40]), TEXT, " ".join(WORDS[20:45])]
"""Two are longer than the sliding windows and chunks of attention."""
CHOICES = [(TEXT, " the moon"), (TEXT, " a red dog sat on the mat"), ("the cat", " is out"), (TEXT, " in")]
_OLD_BODY = "language_model.model."


@dataclass
class Served:
    """A tiny multimodal base.

    Attributes:
        specimen: Its class.
        folder: Its folder.
        plain: The model as transformers loads it.
        adapter: An adapter that was trained on it, also on its vision tower if that has modules of the same names.
        builder: Loads them, and other adapters on the same base.
        ours: The base and the adapter, as pytest-sway loads them.
        named: The name of the base in the summary.
    """

    specimen: Specimen
    folder: Path
    plain: Any
    adapter: Path
    builder: HFBuilder
    ours: HFBackend
    named: str


@pytest.fixture(scope="module", params=KNOWN, ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    specimen: Specimen = request.param
    root = tmp_path_factory.mktemp(specimen.name)
    folder, loads = make_multimodal(root / "base", specimen), list[str]()
    plain = plain_model(folder, specimen)
    adapter = train(plain, root / "adapter", target_modules=specimen.targets)
    builder = HFBuilder(on_base_load=lambda name, _: loads.append(name))
    ours = builder(spec_of(folder, adapter))
    gc.freeze()  # saves time in the garbage collection of each close
    yield Served(specimen, folder, plain, adapter, builder, ours, loads[0])
    assert ours.changes() == []
    ours.close()
    assert ours.leak() is None
    gc.unfreeze()


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _logits(model: Any, tokenizer: Any, text: str = TEXT) -> Any:
    return _logits_of(model, _ids(tokenizer, text))


def _logits_of(model: Any, ids: list[int]) -> Any:
    with torch.inference_mode(), quiet():  # PEFT's prefixes go by a name that transformers warns of
        return model(input_ids=torch.tensor([ids])).logits[0]


def _logprobs(model: Any, ids: list[int]) -> Any:
    """Return the log-probabilities of all tokens but the first, from one plain pass."""
    logprobs = torch.log_softmax(_logits_of(model, ids)[:-1].float(), -1)
    return logprobs[torch.arange(len(ids) - 1), ids[1:]].numpy()


def _with_prefix(tokenizer: Any, text: str) -> list[int]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [first, *_ids(tokenizer, text)]


def _close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- the base ---------------------------------------------------------------------------------------------------------


def test_a_base_is_loaded_by_the_class_that_its_config_names_and_the_summary_says_which(served: Served) -> None:
    with served.ours.as_base() as view:
        assert type(view.model) is type(served.plain)
    assert served.named == f"{served.folder} ({type(served.plain).__name__})"


def test_the_base_computes_as_transformers_does(served: Served) -> None:
    with served.ours.as_base() as view:
        for text in TEXTS:
            expected = _logits(served.plain, view.tokenizer, text)
            assert not expected.isnan().any()
            assert _logits(view.model, view.tokenizer, text).equal(expected)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_texts_score_alone_and_together_as_in_a_plain_pass(served: Served, side: str) -> None:
    with served.ours.as_base() if side == "base" else served.ours.as_finetuned() as view:
        model, tokenizer = view.model, view.tokenizer
        for text, together in zip(TEXTS, view.rolling_logprobs(TEXTS), strict=True):
            expected = _logprobs(model, _with_prefix(tokenizer, text))
            _close(together.logprobs, expected)
            _close(view.rolling_logprob(text).logprobs, expected)
        pairs = [
            float(_logprobs(model, _ids(tokenizer, prompt + answer))[len(_ids(tokenizer, prompt)) - 1 :].sum())
            for prompt, answer in CHOICES
        ]
        _close(view.logprobs_of(CHOICES), pairs)
        _close([view.logprob_of(*pair) for pair in CHOICES], pairs)
        for text, dist in zip(TEXTS, view.next_token_dists(TEXTS, top_k=8), strict=True):
            whole = torch.log_softmax(_logits(model, tokenizer, text)[-1].float(), -1).numpy()
            _close(dist.logprobs, whole[dist.token_ids])
            _close(view.next_token_dist(text, top_k=8).logprobs, dist.logprobs)


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_text_is_generated_as_by_transformers_and_together_as_alone(served: Served, side: str) -> None:
    with served.ours.as_base() if side == "base" else served.ours.as_finetuned() as view:
        alone = [view.generate(text, max_new_tokens=6) for text in TEXTS]
        assert view.generate_many(TEXTS, max_new_tokens=6) == alone
        ids = torch.tensor([view.tokenizer(TEXT)["input_ids"]])
        with torch.inference_mode():
            made = view.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert view.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split() == alone[2].split()


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_of_its_own_class_computes_as_peft_does_and_the_base_as_without_it(served: Served) -> None:
    with served.ours.as_finetuned() as tuned, served.ours.as_base() as base:
        with with_adapter(served.plain, served.adapter) as reference:
            expected = _logits(reference, tuned.tokenizer)
        before = _logits(served.plain, base.tokenizer)
        assert not expected.equal(before)
        assert _logits(tuned.model, tuned.tokenizer).equal(expected)
        assert _logits(base.model, base.tokenizer).equal(before)


def _text_adapter(served: Served, folder: Path, **fields: Any) -> Path:
    """Return an adapter that was trained on the multimodal class, on modules of its text model alone."""
    body, module = text_model(served.plain)
    targets = [name for name, _ in module.named_modules() if name.endswith(("q_proj", "v_proj"))]
    return train(served.plain, folder, **{"target_modules": [f"{body}.{name}" for name in targets]} | fields)


def _renamed(adapter: Path, before: str, now: str) -> Path:
    """Replace the beginning of the names of an adapter's tensors, as a class with other names would have them."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        root = "base_model.model."
        return {name.replace(root + before, root + now): tensor for name, tensor in tensors.items()}

    return edit_weights(adapter, change)


def _expect(served: Served, adapter: Path, expected: Any, *, base: Path | None = None) -> None:
    """Assert that a base with an adapter computes these logits, and so do its scores."""
    backend = served.builder(spec_of(base or served.folder, adapter))
    with backend.as_finetuned() as tuned:
        _close(_logits(tuned.model, tuned.tokenizer), expected)
        _close(tuned.rolling_logprob(TEXT).logprobs, _logprobs(tuned.model, _with_prefix(tuned.tokenizer, TEXT)))
    assert backend.changes() == []
    backend.close()


def _expected(model: Any, adapter: Path, served: Served) -> Any:
    with served.ours.as_base() as view:
        before = _logits(model, view.tokenizer)
        with with_adapter(model, adapter) as reference:
            expected = _logits(reference, view.tokenizer)
    assert not expected.equal(before)
    return expected


def test_an_adapter_with_the_names_of_another_class_is_put_where_it_belongs(served: Served, tmp_path: Path) -> None:
    own = f"{text_model(served.plain)[0]}."
    for layout in {"model.", "language_model.model.", "model.language_model."} - {own}:
        adapter = _text_adapter(served, tmp_path / layout)
        expected = _expected(served.plain, adapter, served)
        _renamed(adapter, own, layout)
        edit_config(adapter, target_modules=["q_proj", "v_proj"])
        _expect(served, adapter, expected)


def _alone(served: Served, folder: Path) -> tuple[Any, Path] | None:
    """Return the text model alone, and the folder that it is saved in; ``None`` if transformers has no such class."""
    alone = text_alone(served.plain)
    if alone is None:
        return None
    with quiet():
        alone.save_pretrained(folder)
    for file in served.folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    return alone, folder


def test_an_adapter_that_was_trained_on_the_text_model_alone_is_put_on_the_multimodal_class_and_the_other_way_round(
    served: Served, tmp_path: Path
) -> None:
    found = _alone(served, tmp_path / "alone")
    if found is None:
        assert served.specimen.name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
        return
    alone, folder = found
    adapter = train(alone, tmp_path / "text")
    _expect(served, adapter, _expected(alone, adapter, served))
    adapter = _text_adapter(served, tmp_path / "multimodal")
    edit_config(adapter, base_model_name_or_path=None)  # it names the multimodal base
    _expect(served, adapter, _expected(served.plain, adapter, served), base=folder)


def test_the_lowest_supported_transformers_alone_may_lack_a_class() -> None:
    missing = [str(specimen) for specimen in SPECIMENS if specimen not in KNOWN]
    assert missing == [] or TRANSFORMERS_VERSION < (5, 0)


def test_the_docs_have_the_table_of_classes() -> None:
    assert PAGE.read_text() == page(), "write it anew: python -m tests.unit.backends.hf.multimodal"


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_multimodal(tmp_path_factory.mktemp("llama4"), next(each for each in SPECIMENS if each.name == "llama4"))


def _multimodal_llama4(folder: Path) -> Any:
    import transformers

    model_class: Any = transformers.Llama4ForConditionalGeneration
    with quiet():
        return model_class.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.skipif(TRANSFORMERS_VERSION < (5, 0), reason="about transformers 5")
def test_the_multimodal_class_of_llama4_fails_in_transformers_5_for_text(llama4: Path) -> None:
    model, ids = _multimodal_llama4(llama4), torch.tensor([[1, 5, 6]])
    for given in ({"input_ids": ids}, {"inputs_embeds": torch.zeros(1, 3, 32)}):
        with pytest.raises(AttributeError, match="image_outputs"), torch.inference_mode():
            model(**given)  # where it no longer fails, it can be served by this class


@pytest.mark.skipif(TRANSFORMERS_VERSION >= (5, 0), reason="about transformers 4")
def test_llama4_is_refused_with_transformers_4_where_later_tokens_change_earlier_logits(
    build: Any, llama4: Path
) -> None:
    model = _multimodal_llama4(llama4)
    assert not _logits_of(model, [1, 5, 6]).allclose(_logits_of(model, [1, 5, 6, 8])[:3], atol=0.1)
    with pytest.raises(SpecError, match="is not a causal language model: in its Llama4ForCausalLM, later tokens"):
        build(llama4)


# --- forms of adapters ------------------------------------------------------------------------------------------------

_LAYERS = r"model\.layers\.1\..*(q|v)_proj"
FORMS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": _LAYERS},
    "full names": {"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]},
    "some layers": {"layers_to_transform": [1]},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "rank_pattern": {
        "rank_pattern": {"v_proj": 3, r"model\.layers\.1\.self_attn\.q_proj": 4},
        "alpha_pattern": {"v_proj": 5},
    },
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "the output layer saved": {"modules_to_save": ["lm_head"]},
    "norms saved": {"modules_to_save": ["norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 6]}},
    "the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "PiSSA": {"init_lora_weights": "pissa"},
    "IA3": {"kind": "IA3Config", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LoHa": {"kind": "LoHaConfig", "target_modules": ["q_proj"], "r": 2},
    "OFT": {"kind": "OFTConfig", "target_modules": ["q_proj"], "oft_block_size": 8, "r": 0},
    "VeRA": {"kind": "VeraConfig", "target_modules": ["q_proj"], "r": 4},
    "norms": {"kind": "LNTuningConfig", "target_modules": ["input_layernorm"]},
    "prompts": {"kind": "PromptTuningConfig", "num_virtual_tokens": 3},
    "prefixes": {"kind": "PrefixTuningConfig", "num_virtual_tokens": 3},
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any, HFBuilder]]:
    """A multimodal base whose vision tower has modules with the names of the text model's, and the text model alone."""
    folder = tmp_path_factory.mktemp("llava")
    specimen = next(each for each in SPECIMENS if each.name == "llava")
    make_multimodal(folder, specimen)
    builder = HFBuilder()
    with closing(builder(spec_of(folder))):
        yield folder, text_alone(plain_model(folder, specimen)), builder


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_adapter_that_was_trained_on_the_text_model_alone_changes_that_and_no_vision_tower(
    llava: Any, tmp_path: Path, form: str
) -> None:
    folder, alone, builder = llava
    adapter = train(copy.deepcopy(alone), tmp_path, **FORMS[form])
    with closing(builder(spec_of(folder, adapter))) as backend, backend.as_finetuned() as tuned:
        before = _logits(alone, tuned.tokenizer)
        with with_adapter(copy.deepcopy(alone), adapter) as reference:
            expected = _logits(reference, tuned.tokenizer)
        assert not expected.equal(before)
        _close(_logits(tuned.model, tuned.tokenizer), expected)
        ours = dict(tuned.model.named_modules())
        assert not any("vision" in name and ("lora" in name or "modules_to_save" in name) for name in ours)
        assert backend.changes() == []


# --- what else may differ ---------------------------------------------------------------------------------------------


@pytest.fixture
def base(llava: Any, tmp_path: Path) -> Path:
    """A copy of a multimodal base's folder, for a test to change."""
    return Path(shutil.copytree(llava[0], tmp_path / "base"))


def _plain_llava(folder: Path) -> Any:
    return plain_model(folder, next(each for each in SPECIMENS if each.name == "llava"))


def test_an_adapter_in_the_files_of_an_older_transformers_is_put_on_the_vision_tower_too(
    build: Any, base: Path, tmp_path: Path
) -> None:
    plain = _plain_llava(base)
    adapter = train(plain, tmp_path / "adapter")
    with with_adapter(plain, adapter) as reference:
        expected = {name: tensor.clone() for name, tensor in reference.state_dict().items() if "lora" in name}
    assert any("vision" in name for name in expected)
    _renamed(adapter, "model.language_model.", "language_model.model.")
    _renamed(adapter, "model.vision_tower.vision_model.", "vision_tower.vision_model.")
    _renamed(adapter, "model.vision_tower.", "vision_tower.vision_model.")
    with build(base, adapter).as_finetuned() as tuned:
        found = tuned.model.state_dict()
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_a_pruned_adalora_adapter_with_the_names_of_another_class_keeps_its_ranks(
    build: Any, base: Path, tmp_path: Path
) -> None:
    import peft

    plain = _plain_llava(base)
    body, module = text_model(plain)
    targets = [f"{body}.{name}" for name, _ in module.named_modules() if name.endswith(("q_proj", "v_proj"))]
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=6, target_modules=targets)
    adapter = tmp_path / "adapter"
    save_noise(lambda: _plain_llava(base), config, adapter)
    prune(adapter)
    with with_adapter(plain, adapter) as reference:
        expected = {name: tensor.clone() for name, tensor in reference.state_dict().items() if "lora" in name}
    _renamed(adapter, f"{body}.", "language_model.model.")
    ranks = json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {name.replace(f"{body}.", "language_model.model."): kept for name, kept in ranks.items()}
    edit_config(adapter, rank_pattern=ranks, target_modules=["q_proj", "v_proj"])
    with build(base, adapter).as_finetuned() as tuned:
        found = tuned.model.state_dict()
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_an_adapter_on_a_vision_tower_does_not_fit_the_text_model_alone(build: Any, llava: Any, tmp_path: Path) -> None:
    folder, alone, _ = llava
    adapter = train(_plain_llava(folder), tmp_path / "adapter", target_modules=r".*vision_tower.*q_proj")
    edit_config(adapter, base_model_name_or_path=None)
    with quiet():
        alone.save_pretrained(tmp_path / "alone")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "alone")
    with pytest.raises(AdapterMismatchError, match=r"does not fit the base .*model\.vision_tower\."):
        build(tmp_path / "alone", adapter)


@pytest.mark.parametrize("form", ["LoRA", "IA3", "VeRA"])
def test_an_adapter_on_a_vision_tower_alone_is_said_to_change_nothing_for_text(
    build: Any, base: Path, tmp_path: Path, form: str
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "LoRA": {},
        "IA3": {"kind": "IA3Config", "feedforward_modules": []},
        "VeRA": {"kind": "VeraConfig", "r": 4},
    }
    adapter = train(_plain_llava(base), tmp_path / "eyes", target_modules=r".*vision_tower.*q_proj", **kinds[form])
    with pytest.warns(SwayWarning, match=r"eyes' changes nothing on the base .* for text, .* \(model\.vision_tower\."):
        backend = build(base, adapter)
    with backend.as_finetuned() as tuned:
        assert any(name.endswith("q_proj.base_layer") and "vision" in name for name, _ in tuned.model.named_modules())


def test_an_adapter_on_a_vision_tower_and_the_text_model_is_served_without_a_word(
    build: Any, base: Path, tmp_path: Path
) -> None:
    adapter = train(_plain_llava(base), tmp_path / "adapter", target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(base, adapter)


def test_a_merged_adapter_on_a_vision_tower_alone_is_said_to_change_nothing_for_text(
    build: Any, base: Path, tmp_path: Path
) -> None:
    plain = _plain_llava(base)
    eyes = train(plain, tmp_path / "eyes", target_modules=r".*vision_tower.*q_proj")
    words = train(plain, tmp_path / "words", target_modules=r".*language_model.*q_proj")
    with pytest.warns(SwayWarning, match=r"eyes' changes nothing on the base .* for text"):
        build(base, [eyes, words])


def test_a_fine_tuned_model_with_another_vision_tower_alone_is_said_to_equal_its_base_for_text(
    build: Any, base: Path, tmp_path: Path
) -> None:
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    edit_weights(
        tuned,
        lambda tensors: {name: tensor + ("vision" in name) for name, tensor in tensors.items()},
        file="model.safetensors",
    )
    with pytest.warns(SwayWarning, match=r"tuned' is equal to its base .* for text"):
        build(base, finetuned=str(tuned))


def test_an_encoder_and_a_decoder_are_no_parts_beside_text() -> None:
    import transformers

    parts = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    parts |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.T5GemmaForConditionalGeneration(transformers.T5GemmaConfig(encoder=parts, decoder=parts))
    assert text_parts(model) == ()


def test_a_warning_about_an_adapter_that_is_an_error_stays_that_warning(build: Any, base: Path, tmp_path: Path) -> None:
    adapter = train(_plain_llava(base), tmp_path / "eyes", target_modules=r".*vision_tower.*q_proj")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SwayWarning, match=r"eyes' changes nothing on the base"):
            build(base, adapter)


@pytest.mark.skipif(TRANSFORMERS_VERSION < (5, 0), reason="transformers 4 has no AutoModelForMultimodalLM")
def test_a_model_of_sounds_and_text_is_loaded_in_the_same_way(build: Any, tmp_path: Path) -> None:
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    vocab = make_tokenizer(tmp_path, extra=("<sound>",))
    tokens = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = VoxtralConfig(
        audio_config={**sizes, "head_dim": 16, "num_mel_bins": 8, "max_source_positions": 8},
        text_config={**TEXT_FIELDS, **tokens, "model_type": "llama", "sliding_window": None},
        audio_token_id=vocab - 1,
    )
    folder = save_tiny(lambda: VoxtralForConditionalGeneration(config), tmp_path)
    model_class: Any = VoxtralForConditionalGeneration
    with quiet():
        plain = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    with build(folder).as_base() as view:
        assert type(view.model) is VoxtralForConditionalGeneration
        assert _logits(view.model, view.tokenizer).equal(_logits(plain, view.tokenizer))
        _close(view.rolling_logprob(TEXT).logprobs, _logprobs(plain, _with_prefix(view.tokenizer, TEXT)))


def test_a_config_with_the_fields_of_the_text_model_at_its_top_is_understood(build: Any, tmp_path: Path) -> None:
    specimen = next(each for each in SPECIMENS if each.name == "qwen2_vl")
    folder = make_multimodal(tmp_path, specimen)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config.pop("text_config"), **config}))  # as Qwen2-VL is on the hub
    with build(folder).as_base() as view:
        assert _logits(view.model, view.tokenizer).equal(_logits(plain_model(folder, specimen), view.tokenizer))


@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl", "llava"])
def test_a_placeholder_of_an_image_scores_as_transformers_scores_it(build: Any, tmp_path: Path, name: str) -> None:
    folder = make_multimodal(tmp_path, next(each for each in SPECIMENS if each.name == name))
    with build(folder).as_base() as view:
        text = f"the <image> {TEXT}"
        _close(view.rolling_logprob(text).logprobs, _logprobs(view.model, _with_prefix(view.tokenizer, text)))


def test_sizes_before_the_load_are_those_of_the_loaded_base(build: Any, builder: HFBuilder, base: Path) -> None:
    (estimate,) = (builder.check(spec_of(base)).sizes or {}).values()
    assert estimate == pytest.approx(base_in(build(base)).nbytes, rel=0.001)


def test_a_vocabulary_that_an_adapter_resized_is_the_loaded_models(build: Any, base: Path, tmp_path: Path) -> None:
    plain = _plain_llava(base)
    with quiet():
        plain.resize_token_embeddings(make_tokenizer(tmp_path, extra=("quark", "lepton", "<image>")) + 4)
    adapter = train(plain, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with build(base, adapter).as_finetuned() as tuned:
        assert tuned.model.get_input_embeddings().weight.shape[0] == plain.get_input_embeddings().weight.shape[0]
        assert tuned.model.config.get_text_config().vocab_size == plain.config.get_text_config().vocab_size
        assert tuned.logprob_of("the quark", " lepton") < 0


@pytest.mark.usefixtures("exposed")
def test_a_changed_vision_tower_is_seen(build: Any, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view, torch.no_grad():
        next(p for name, p in view.model.named_parameters() if "vision_tower" in name).add_(1)
    assert [line for line in backend.changes() if "vision_tower" in line]


def test_converted_weights_are_shared_between_workers(base: Path, tmp_path: Path) -> None:
    with quiet():
        _plain_llava(base).to(torch.bfloat16).save_pretrained(base)
    builders = [HFBuilder(share_weights=tmp_path), HFBuilder()]
    with closing(builders[0](spec_of(base))) as shared, closing(builders[1](spec_of(base))) as own:
        assert any(tmp_path.iterdir())
        with shared.as_base() as one, own.as_base() as other:
            assert type(one.model) is type(other.model)
            assert _logits(one.model, one.tokenizer).equal(_logits(other.model, one.tokenizer))


# --- refusals ---------------------------------------------------------------------------------------------------------

ENCODERS = {"clip": "CLIPModel", "siglip": "SiglipModel", "vit": "ViTModel", "hubert": "HubertModel"}


def test_a_multimodal_class_that_needs_an_image_is_refused_in_one_sentence(build: Any, tmp_path: Path) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration

    tokens = {"vocab_size": make_tokenizer(tmp_path), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={**small, **tokens, "encoder_hidden_size": 32, "projection_dim": 32},
        vision_config={**small, "image_size": 28, "patch_size": 14, "projection_dim": 32},
        projection_dim=32,
        image_text_hidden_size=32,
    )
    with quiet():
        BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match="BlipForConditionalGeneration, which does not compute logits for text alone"):
        build(tmp_path)


def test_a_multimodal_class_whose_tokens_see_later_ones_is_refused(build: Any, tmp_path: Path) -> None:
    import transformers

    vocab = make_tokenizer(tmp_path, extra=("<image>",))
    tokens = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": None}
    with quiet():
        config = transformers.PaliGemmaConfig(
            text_config={**TEXT_FIELDS, **tokens, "model_type": "gemma"},
            vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_index=vocab - 1,
            projection_dim=32,
            hidden_size=32,
        )
    folder = save_tiny(lambda: transformers.PaliGemmaForConditionalGeneration(config), tmp_path)
    what = r"is not a causal language model: in its PaliGemmaForConditionalGeneration, later tokens change the logits"
    with pytest.raises(SpecError, match=what):
        build(folder)


@pytest.mark.parametrize(("kind", "named"), ENCODERS.items())
def test_a_model_of_a_type_without_a_language_model_is_refused_in_one_sentence(
    build: Any, base: Path, kind: str, named: str
) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [named]}))
    with pytest.raises(SpecError, match=rf"has model_type = '{kind}', and transformers has no causal language model"):
        build(base)


@pytest.mark.parametrize("kept", [True, False])
def test_a_class_that_fails_for_text_is_named_with_its_error_and_not_a_field(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AttributeError("no image_outputs")

    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.forward", fail)
    if not kept:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(SpecError, match=r"is of the class Llava.*, which does .* no image_outputs\. Name a"):
        build(base)


def test_a_model_that_writes_down_speech_is_refused_in_one_sentence(build: Any, base: Path) -> None:
    config = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match=r"architectures = .*Whisper.*, a model that writes down speech and takes no"):
        build(base)
