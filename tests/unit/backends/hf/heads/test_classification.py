"""Sequence classifiers and reward models give transformers' and PEFT's logits, in batches."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway import cache_key_for
from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.errors import AdapterMismatchError, ScoringError, SpecError, SwayError, WeightsError
from tests.tiny import edit_config, edit_weights, make_adapter, make_base, pickled, poison, save_adapter
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.heads.models import TEXTS, fresh_model, make_head_adapter, make_model, one_by_one
from tests.unit.backends.hf.insides import bases_in, passes_of

if TYPE_CHECKING:
    from pathlib import Path


AUTO = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal classifier whose config names no padding token."""
    folder = tmp_path_factory.mktemp("llama")
    return make_model(folder, "llama", AUTO, pad_token_id=None, id2label={0: "bad", 1: "good", 2: "odd"})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bert"), "bert", AUTO)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A reward model: an adapter on a plain language model, with the only head."""
    return make_head_adapter(tmp_path_factory.mktemp("reward"), base, AUTO, "SEQ_CLS", num_labels=1)


def _logits(view: Any, texts: list[Any]) -> list[list[float]]:
    return [answer.logits.tolist() for answer in view.classify(texts)]


@pytest.mark.parametrize("pad", [None, 0, -1])
def test_a_batch_has_the_logits_that_each_text_has_alone(build: Any, tmp_path: Path, pad: int | None) -> None:
    folder = make_model(tmp_path, "llama", AUTO, pad_token_id=pad)
    expected = one_by_one(*fresh_model(folder, AUTO), TEXTS)
    with build(folder, task="classification").as_base() as view:
        assert np.allclose(_logits(view, TEXTS), expected, atol=1e-5)
        assert _logits(view, TEXTS[:1]) == expected[:1]
        passes = passes_of(view)
        view.classify([f"{text} !" for text in TEXTS])
        assert max(rows for rows, _ in passes) > len(TEXTS) // 2


def test_a_text_that_ends_with_the_padding_is_read_as_transformers_reads_it(build: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama", AUTO, pad_token_id=2)
    texts = ["hello world</s>", *TEXTS]
    with build(folder, task="classification").as_base() as view:
        assert np.allclose(_logits(view, texts), one_by_one(*fresh_model(folder, AUTO), texts), atol=1e-5)


@pytest.mark.parametrize(("kind", "fields"), [("bert", {}), ("bart", {"ends": True})])
def test_encoders_and_encoder_decoders_classify_in_batches_too(
    build: Any, tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    folder = make_model(tmp_path, kind, AUTO, **fields)
    with build(folder, task="classification").as_base() as view:
        assert np.allclose(_logits(view, TEXTS), one_by_one(*fresh_model(folder, AUTO), TEXTS), atol=1e-5)


def test_texts_and_pairs_are_in_passes_of_their_own_where_end_tokens_are_counted(build: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "bart", AUTO, ends=True)
    mixed = [TEXTS[0], TEXTS[1], (TEXTS[0], TEXTS[1]), TEXTS[2]]
    with build(folder, task="classification").as_base() as view:
        assert np.allclose(_logits(view, mixed), one_by_one(*fresh_model(folder, AUTO), mixed), atol=1e-5)


def test_a_model_that_padding_changes_reads_one_text_at_a_time(
    build: Any, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sway.backends.hf.heads.batches.agree", lambda *_: False)
    expected = one_by_one(*fresh_model(bert, AUTO), TEXTS)
    with build(bert, task="classification").as_base() as view:
        assert _logits(view, TEXTS) == expected


def test_a_trial_without_enough_memory_is_made_again_and_says_nothing_about_padding(
    build: Any, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*_: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    expected = one_by_one(*fresh_model(bert, AUTO), TEXTS)
    with build(bert, task="classification").as_base() as view:
        with monkeypatch.context() as patched:
            patched.setattr("pytest_sway.backends.hf.heads.batches.agree", full)
            assert _logits(view, TEXTS) == expected
        passes = passes_of(view)
        view.classify([f"{text} !" for text in TEXTS])
    assert max(rows for rows, _ in passes) > len(TEXTS) // 2


def test_a_pair_of_texts_is_one_input(build: Any, bert: Path) -> None:
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[0])]
    with build(bert, task="classification").as_base() as view:
        assert np.allclose(_logits(view, pairs), one_by_one(*fresh_model(bert, AUTO), pairs), atol=1e-5)


def test_a_conversation_is_rendered_whole(build: Any, llama: Path) -> None:
    from pytest_sway import Chat

    template = (
        "{% for m in messages %}{{ m['content'] }} {{ '.' }}{% endfor %}{% if add_generation_prompt %}no{% endif %}"
    )
    messages = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "the sun rises"}]
    with build(llama, task="classification").as_base() as view:
        (answer,) = view.classify([Chat(messages, chat_template=template)])
        (expected,) = view.classify(["hello world .the sun rises ."])
    assert answer.logits.tolist() == expected.logits.tolist()


def test_labels_are_those_of_the_config(build: Any, llama: Path) -> None:
    with build(llama, task="classification").as_base() as view:
        (answer,) = view.classify(TEXTS[:1])
    assert answer.labels == ("bad", "good", "odd")
    assert answer.label == answer.labels[int(np.argmax(answer.logits))]
    assert (answer.logits.dtype, answer.logits.shape) == (np.float32, (3,))


def test_labels_can_be_named_in_the_spec(build: Any, bert: Path) -> None:
    named = {"id2label": {"0": "no", "1": "yes"}}
    with build(bert, task="classification", model_kwargs=named).as_base() as view:
        assert view.classify(TEXTS[:1])[0].labels == ("no", "yes")


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapters_task_type_decides_the_head_and_its_own_head_the_number_of_labels(
    build: Any, base: Path, reward: Path
) -> None:
    expected = one_by_one(*fresh_model(base, AUTO, reward, num_labels=1), TEXTS)
    backend = build(base, reward)
    assert backend.spec.task == "classification"
    with backend.as_finetuned() as view:
        assert np.allclose(_logits(view, TEXTS), expected, atol=1e-5)
        assert _logits(view, TEXTS[:1]) == expected[:1]
        assert type(view.model).__name__ == "PeftModelForSequenceClassification"


def test_the_base_of_such_an_adapter_has_no_logits_but_noise(build: Any, base: Path, reward: Path) -> None:
    with (
        build(base, reward).as_base() as view,
        pytest.raises(ScoringError, match=r"its files lack score\.weight.*noise"),
    ):
        view.classify(TEXTS)


def test_a_base_with_a_head_of_its_own_answers_beside_its_adapter(build: Any, llama: Path, tmp_path: Path) -> None:
    adapter = make_head_adapter(tmp_path, llama, AUTO, "SEQ_CLS")
    backend = build(llama, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert np.allclose(_logits(plain, TEXTS), one_by_one(*fresh_model(llama, AUTO), TEXTS), atol=1e-5)
        assert np.allclose(_logits(tuned, TEXTS), one_by_one(*fresh_model(llama, AUTO, adapter), TEXTS), atol=1e-5)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_spec_says_the_task_where_the_adapter_does_not(
    build: Any, base: Path, reward: Path, tmp_path: Path, task_type: str | None
) -> None:
    folder = edit_config(shutil.copytree(reward, tmp_path / "reward"), task_type=task_type)
    with build(base, folder, task="classification").as_finetuned() as found, build(base, reward).as_finetuned() as view:
        assert _logits(found, TEXTS) == _logits(view, TEXTS)
    if task_type is None:
        with pytest.raises(AdapterMismatchError, match="Write task='classification', or another task"):
            build(base, folder)


def test_a_prompt_adapter_is_read_as_peft_reads_it(build: Any, llama: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    folder = save_adapter(tmp_path, llama, config, auto=AUTO)
    expected = one_by_one(*fresh_model(llama, AUTO, folder), TEXTS)
    with build(llama, folder).as_finetuned() as view:
        assert np.allclose(_logits(view, TEXTS), expected, atol=1e-5)


def test_a_prompt_adapter_brings_the_head_that_its_base_lacks(build: Any, base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    folder = save_adapter(tmp_path, base, config, auto=AUTO, num_labels=4)
    expected = one_by_one(*fresh_model(base, AUTO, folder, num_labels=4), TEXTS)
    with build(base, folder).as_finetuned() as view:
        assert np.allclose(_logits(view, TEXTS), expected, atol=1e-5)


def test_a_head_that_is_noise_is_the_same_in_each_process(tmp_path: Path) -> None:
    stored = make_base(tmp_path / "base", dtype="bfloat16")
    adapter = make_head_adapter(tmp_path / "adapter", stored, AUTO, "SEQ_CLS")
    shared = tmp_path / "shared"
    shared.mkdir()
    found = []
    for _ in range(2):  # the first writes the converted weights, the second maps them
        backend = HFBuilder(share_weights=shared)(spec_of(stored, adapter))
        with backend.as_finetuned() as tuned, backend.as_base() as plain:
            found.append((_logits(tuned, TEXTS), plain.model.score.weight.tolist()))
            with pytest.raises(ScoringError, match="noise"):
                plain.classify(TEXTS)
        backend.close()
    assert found[0] == found[1]
    assert len(list(shared.glob("*/base"))) == 1


@pytest.mark.parametrize("sharded", [False, True])
def test_an_adapter_brings_the_head_of_a_base_in_a_pickle(tmp_path: Path, sharded: bool) -> None:
    plain = make_model(tmp_path / "base", "bert", "AutoModel")
    adapter = make_head_adapter(tmp_path / "a", plain, AUTO, "SEQ_CLS", targets=["query", "value"], num_labels=4)
    expected = one_by_one(*fresh_model(plain, AUTO, adapter, num_labels=4), TEXTS)
    _pickled_base(plain, sharded=sharded)
    backend = HFBuilder()(spec_of(plain, adapter, allow_pickle=True))
    with backend.as_finetuned() as tuned, backend.as_base() as view:
        assert np.allclose(_logits(tuned, TEXTS), expected, atol=1e-5)
        with pytest.raises(ScoringError, match=r"its files lack classifier.*noise"):
            view.classify(TEXTS)
    backend.close()


@pytest.mark.parametrize("base_pickled", [False, True])
@pytest.mark.parametrize("adapter_pickled", [False, True])
def test_an_adapter_with_other_labels_than_its_bases_own_head_does_not_fit_in_whatever_files(
    build: Any, tmp_path: Path, base_pickled: bool, adapter_pickled: bool
) -> None:
    classifier = make_model(tmp_path / "base", "bert", AUTO, num_labels=3)
    adapter = make_head_adapter(tmp_path / "a", classifier, AUTO, "SEQ_CLS", targets=["query", "value"], num_labels=3)
    edit_weights(adapter, lambda weights: {name: _five_labels(name, tensor) for name, tensor in weights.items()})
    if base_pickled:
        _pickled_base(classifier)
    if adapter_pickled:
        pickled(adapter)
    file = "adapter_model.bin" if adapter_pickled else "adapter_model.safetensors"
    with pytest.raises(AdapterMismatchError, match=rf"does not fit the base .*{file}.*\[5, 32\]"):
        build(classifier, adapter, allow_pickle=True)


def _five_labels(name: str, tensor: Any) -> Any:
    return tensor[:1].repeat(5, *[1] * (tensor.dim() - 1)) if "classifier" in name else tensor


def test_an_adapter_in_a_pickle_says_how_many_labels_its_head_has(build: Any, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "base", "bert", "AutoModel")
    adapter = make_head_adapter(tmp_path / "a", plain, AUTO, "SEQ_CLS", targets=["query", "value"], num_labels=4)
    expected = one_by_one(*fresh_model(plain, AUTO, adapter, num_labels=4), TEXTS)
    _pickled_base(plain)
    pickled(adapter)
    with build(plain, adapter, allow_pickle=True).as_finetuned() as view:
        assert np.allclose(_logits(view, TEXTS), expected, atol=1e-5)


def test_a_bases_pickle_is_looked_into_once_and_its_values_only_mapped(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    plain = make_model(tmp_path / "base", "bert", "AutoModel")
    adapter = make_head_adapter(tmp_path / "a", plain, AUTO, "SEQ_CLS", targets=["query", "value"], num_labels=4)
    _pickled_base(plain)
    ours: list[Any] = []
    load: Any = torch.load

    def counted(*args: Any, **settings: Any) -> Any:
        if str(sys._getframe(1).f_globals["__name__"]).startswith("pytest_sway."):
            ours.append(settings.get("mmap"))
        return load(*args, **settings)

    monkeypatch.setattr(torch, "load", counted)
    build(plain, adapter, allow_pickle=True)
    assert ours == [True]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_a_broken_pickle_below_an_adapter_with_a_head_is_told(build: Any, tmp_path: Path, file: str) -> None:
    plain = make_model(tmp_path / "base", "bert", "AutoModel")
    adapter = make_head_adapter(tmp_path / "a", plain, AUTO, "SEQ_CLS", targets=["query", "value"], num_labels=4)
    (plain / "model.safetensors").unlink()
    (plain / file).write_bytes(b"[]")
    with pytest.raises(SwayError, match=r"^the base .* cannot be loaded from its files"):
        build(plain, adapter, allow_pickle=True)


@pytest.mark.parametrize("lacks_body", [False, True])
def test_a_base_in_a_pickle_must_have_its_body_and_a_head_without_an_adapter(
    build: Any, tmp_path: Path, lacks_body: bool
) -> None:
    plain = make_model(tmp_path, "bert", AUTO if lacks_body else "AutoModel")
    _pickled_base(plain, without="encoder.layer.0" if lacks_body else None)
    what = "lack 16 of the model's weights" if lacks_body else r"lack 2 of the weights of its head.*classifier"
    with pytest.raises(WeightsError, match=what):
        build(plain, task="classification", allow_pickle=True)


def _pickled_base(folder: Path, *, sharded: bool = False, without: str | None = None) -> None:
    """Move a base's weights from safetensors into a pickle, or into two and an index."""
    import torch
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if without is None or without not in name}
    path.unlink()
    if not sharded:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = list(weights)
    files = {f"pytorch_model-0000{i}-of-00002.bin": names[i - 1 :: 2] for i in (1, 2)}
    for file, some in files.items():
        torch.save({name: weights[name] for name in some}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_no_texts_have_no_logits(build: Any, bert: Path, llama: Path) -> None:
    for folder in (bert, llama):
        with build(folder, task="classification").as_base() as view:
            passes = passes_of(view)
            assert view.classify([]) == []
            assert not passes


def test_an_encoders_adapter_keeps_its_classifier(build: Any, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "base", "bert", "AutoModel")
    adapter = make_head_adapter(tmp_path / "a", plain, AUTO, "SEQ_CLS", targets=["query", "value"], num_labels=4)
    expected = one_by_one(*fresh_model(plain, AUTO, adapter, num_labels=4), TEXTS)
    with build(plain, adapter).as_finetuned() as view:
        assert np.allclose(_logits(view, TEXTS), expected, atol=1e-5)


def test_adapters_on_adapters_are_merged_with_their_heads(build: Any, base: Path, reward: Path, tmp_path: Path) -> None:
    second = make_head_adapter(tmp_path, base, AUTO, "SEQ_CLS", num_labels=1, seed=5)
    expected = one_by_one(*fresh_model(base, AUTO, reward, second, num_labels=1), TEXTS)
    with build(base, [reward, second]).as_finetuned() as view:
        assert np.allclose(_logits(view, TEXTS), expected, atol=1e-5)


def test_a_language_models_adapter_below_a_reward_model_brings_no_head(
    build: Any, base: Path, adapter: Path, reward: Path, tmp_path: Path
) -> None:
    model, tokenizer = fresh_model(base, "AutoModelForCausalLM", adapter)
    model.merge_and_unload().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = one_by_one(*fresh_model(tmp_path, AUTO, reward, num_labels=1), TEXTS)
    with build(base, [adapter, reward]).as_finetuned() as view:
        assert np.allclose(_logits(view, TEXTS), expected, atol=1e-5)


def test_a_scaled_adapter_keeps_its_head(build: Any, base: Path, reward: Path) -> None:
    backend = build(base, reward)
    with (
        backend.as_scaled_adapter(1.0) as scaled,
        backend.as_finetuned() as tuned,
        backend.as_scaled_adapter(0.0) as none,
    ):
        assert _logits(scaled, TEXTS) == _logits(tuned, TEXTS)
        assert not np.allclose(_logits(none, TEXTS), _logits(tuned, TEXTS), atol=1e-3)


def test_a_whole_fine_tuned_classifier_beside_a_plain_base(build: Any, base: Path, llama: Path) -> None:
    backend = build(base, finetuned=str(llama), task="classification", model_kwargs={"num_labels": 3})
    with backend.as_finetuned() as view:
        assert np.allclose(_logits(view, TEXTS), one_by_one(*fresh_model(llama, AUTO), TEXTS), atol=1e-5)


def test_an_adapter_without_the_head_that_its_base_lacks_is_refused_before_the_load(
    builder: HFBuilder, base: Path, adapter: Path, loads: list[str], tmp_path: Path
) -> None:
    folder = edit_config(make_adapter(tmp_path, base), task_type="SEQ_CLS")
    with pytest.raises(AdapterMismatchError, match=r"task_type = 'SEQ_CLS'.*neither it nor the base .* head"):
        builder.check(spec_of(base, folder))


def test_a_part_of_the_head_that_nobody_brings_is_named(build: Any, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "base", "bert", "AutoModel", add_pooling_layer=False)
    adapter = make_head_adapter(tmp_path / "a", plain, AUTO, "SEQ_CLS", targets=["query"], num_labels=4)
    edit_weights(
        plain, lambda tensors: {k: t for k, t in tensors.items() if "pooler" not in k}, file="model.safetensors"
    )
    with pytest.raises(AdapterMismatchError, match=r"weights of the head \(bert\.pooler\.dense\.bias, bert\.pooler"):
        build(plain, adapter)


def test_a_base_without_a_head_and_without_an_adapter_is_refused(build: Any, base: Path) -> None:
    with pytest.raises(WeightsError, match=r"lack 1 of the weights of its head for task='classification' \(score"):
        build(base, task="classification")


def test_a_damaged_body_is_not_taken_for_a_missing_head(build: Any, base: Path, reward: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    edit_weights(
        folder, lambda tensors: {k: t for k, t in tensors.items() if "norm" not in k}, file="model.safetensors"
    )
    adapter = edit_config(shutil.copytree(reward, tmp_path / "reward"), base_model_name_or_path=str(folder))
    with pytest.raises(WeightsError, match="lack 5 of the model's weights"):
        build(folder, adapter)


# --- what it can't answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda view: view.logprob_of("the sun", " rises"),
        lambda view: view.rolling_logprob("the sun"),
        lambda view: view.next_token_dist("the sun"),
        lambda view: view.generate("the sun"),
        lambda view: view.embed(["the sun"]),
    ],
)
def test_other_questions_are_refused_in_a_sentence(build: Any, llama: Path, ask: Any) -> None:
    what = r"is a question for task='.*the model of the view 'base' is a sequence classifier .*it answers classify"
    with build(llama, task="classification").as_base() as view, pytest.raises(ScoringError, match=what):
        ask(view)


def test_a_language_model_classifies_nothing(build: Any, base: Path) -> None:
    what = (
        "classify is a question for task='classification', but the model of the view 'base' is a causal language model"
    )
    with build(base).as_base() as view, pytest.raises(ScoringError, match=what):
        view.classify(TEXTS)


def test_a_classifier_that_is_loaded_as_a_language_model_is_named(build: Any, llama: Path, bert: Path) -> None:
    with pytest.raises(WeightsError, match=r"names LlamaForSequenceClassification, .* with task='classification'"):
        build(llama)
    with pytest.raises(
        (SpecError, WeightsError), match=r"names BertForSequenceClassification, .* task='classification'"
    ):
        build(bert)


def test_a_text_that_is_too_long_is_refused(build: Any, bert: Path) -> None:
    what = "a text has 130 tokens, but the model reads at most 128 at once"
    with build(bert, task="classification").as_base() as view, pytest.raises(ScoringError, match=what):
        view.classify(["sun " * 130])


@pytest.mark.parametrize("texts", ["the sun", [5], [("a", "b", "c")]])
def test_what_is_no_text_is_refused(build: Any, llama: Path, texts: Any) -> None:
    with build(llama, task="classification").as_base() as view, pytest.raises(ScoringError, match="expected"):
        view.classify(texts)


def test_nan_is_found(build: Any, base: Path, reward: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterMismatchError, match="NaN"):
        build(base, poison(shutil.copytree(reward, tmp_path / "reward")))


# --- as for others ----------------------------------------------------------------------------------------------------


def test_two_tasks_on_one_base_are_two_loads_and_two_adapters_of_one_task_are_one(
    build: Any, base: Path, adapter: Path, reward: Path, tmp_path: Path, builder: HFBuilder, loads: list[str]
) -> None:
    other = make_head_adapter(tmp_path, base, AUTO, "SEQ_CLS", num_labels=1, seed=7)
    for folder in (adapter, reward, other):
        build(base, folder)
    assert loads == [str(base), f"{base} (classification, num_labels=1)"]
    assert len(bases_in(builder)) == 2


def test_a_spec_that_says_its_adapters_task_is_the_same_load(base: Path, reward: Path) -> None:
    said = cache_key_for(spec_of(base, reward, task="classification"))
    assert cache_key_for(spec_of(base, reward)) == said != cache_key_for(spec_of(base, reward, task="causal"))


def test_a_mutation_of_a_classifier_is_found(build: Any, base: Path, reward: Path, exposed: None) -> None:
    import torch

    backend = build(base, reward)
    with backend.as_finetuned() as view, torch.no_grad():
        view.classify(TEXTS)
        assert backend.changes() == []
        view.model.base_model.model.score.modules_to_save["default"].weight.add_(1)
    assert any("score" in line for line in backend.changes())


def test_an_evicted_classifier_is_freed(base: Path, reward: Path) -> None:
    from pytest_sway import BackendCache

    cache = BackendCache(max_size=1)
    with cache.lease({"base": base, "adapter": reward, "device": "cpu", "dtype": "fp32"}) as lease:
        with lease.as_finetuned() as view:
            view.classify(TEXTS)
        backend = lease
    with cache.lease({"base": base, "device": "cpu", "dtype": "fp32"}):
        assert backend.leak() is None
    cache.shutdown()


def test_answers_of_the_base_are_remembered(build: Any, llama: Path, tmp_path: Path) -> None:
    backend = build(llama, task="classification")
    with backend.as_base() as view:
        first = _logits(view, TEXTS)
    with build(llama, make_head_adapter(tmp_path, llama, AUTO, "SEQ_CLS")).as_base() as view:
        passes = passes_of(view)
        assert _logits(view, TEXTS) == first
        assert passes == []


def test_both_sides_pass_the_preflight(build: Any, base: Path, reward: Path) -> None:
    assert build(base, reward).preflight_finite_check() == (True, "")


def test_in_half_precision_a_batch_agrees_as_that_allows(build: Any, base: Path, reward: Path) -> None:
    with build(base, reward, dtype="bf16").as_finetuned() as view:
        together, alone = _logits(view, TEXTS), [_logits(view, [text])[0] for text in TEXTS]
    assert np.allclose(together, alone, atol=0.05)


def test_the_label_says_the_task(build: Any, llama: Path) -> None:
    assert str(build(llama, task="classification").spec).endswith(f"{llama.name} (classification)")
    assert json.loads(json.dumps(build(llama, task="classification").spec.as_dict()))["task"] == "classification"
