"""Sequence-to-sequence models score and generate as transformers and PEFT do, in batches."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.errors import ScoringError, SwayWarning
from tests.unit.backends.hf.heads.models import TEXTS, fresh_model, make_head_adapter, make_model
from tests.unit.backends.hf.insides import computing_model

if TYPE_CHECKING:
    from pathlib import Path

AUTO = "AutoModelForSeq2SeqLM"
PAIRS = [(text, " the sea") for text in TEXTS] + [(TEXTS[0], " in the west and no more"), ("", "hello")]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("t5"), "t5", AUTO, ends=True)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bart"), "bart", AUTO, ends=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, t5: Path) -> Path:
    return make_head_adapter(tmp_path_factory.mktemp("adapter"), t5, AUTO, "SEQ_2_SEQ_LM", targets=["q", "v"])


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


both = pytest.mark.parametrize("folder", ["t5", "bart"], indirect=True)


def _alone(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    """Return a completion's log-probability, from the loss that transformers computes."""
    import torch

    prompt_ids = tokenizer(prompt)["input_ids"] if prompt else [tokenizer.bos_token_id]
    labels = torch.tensor([tokenizer(completion, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        loss = model(input_ids=torch.tensor([prompt_ids]), labels=labels).loss
    return -float(loss) * labels.shape[1]


@both
def test_logprobs_in_a_batch_are_those_of_each_pair_alone(build: Any, folder: Path) -> None:
    model, tokenizer = fresh_model(folder, AUTO)
    with build(folder, task="seq2seq").as_base() as view:
        rows: list[int] = []
        hook = computing_model(view).register_forward_pre_hook
        hook(lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True)
        found = view.logprobs_of(PAIRS)
        assert max(rows) > len(PAIRS) // 2
    assert np.allclose(found, [_alone(model, tokenizer, *pair) for pair in PAIRS], atol=1e-4)


@pytest.mark.parametrize("kind", ["mbart", "plbart", "fsmt"])
@pytest.mark.parametrize("forced", [{}, {"forced_bos_token_id": 9}], ids=["", "forced"])
def test_where_labels_would_put_the_last_token_first_a_score_begins_as_generation_does(
    build: Any, tmp_path: Path, kind: str, forced: dict[str, int]
) -> None:
    folder = make_model(tmp_path, kind, AUTO, ends=True)
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 2, **forced}))
    model, tokenizer = fresh_model(folder, AUTO)
    expected = [_after(model, tokenizer, [2, *forced.values()], *pair) for pair in PAIRS[:-1]]
    with build(folder, task="seq2seq").as_base() as view:
        assert np.allclose(view.logprobs_of(PAIRS[:-1]), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["bart", "mbart", "plbart"])
def test_what_the_model_generates_has_the_logprob_that_it_had_then(build: Any, tmp_path: Path, kind: str) -> None:
    folder = make_model(tmp_path, kind, AUTO, ends=True, forced_bos_token_id=None)
    model, tokenizer = fresh_model(folder, AUTO)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    written = model.generate(
        **inputs, max_new_tokens=4, num_beams=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    new = written.sequences[0, 1:].tolist()
    expected = sum(float(step.log_softmax(-1)[0, token]) for step, token in zip(written.logits, new, strict=True))
    with build(folder, task="seq2seq").as_base() as view:
        assert np.isclose(view.logprob_of(TEXTS[0], tokenizer.decode(new)), expected, atol=1e-4)


def _after(model: Any, tokenizer: Any, begins: list[int], prompt: str, completion: str) -> float:
    """Return a completion's log-probability after the tokens with which the decoder begins."""
    import torch

    scored = tokenizer(completion, add_special_tokens=False)["input_ids"]
    decoder = torch.tensor([[*begins, *scored[:-1]]])
    with torch.inference_mode():
        prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        logits = model(input_ids=prompt_ids, decoder_input_ids=decoder, use_cache=False).logits
    logprobs = torch.log_softmax(logits[0, -len(scored) :], -1)
    return float(logprobs[range(len(scored)), scored].sum())


@both
def test_the_base_generates_what_transformers_generates_greedily(build: Any, folder: Path) -> None:
    model, tokenizer = fresh_model(folder, AUTO)
    expected = []
    for text in TEXTS:
        output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, do_sample=False, num_beams=1)
        expected.append(tokenizer.decode(output[0], skip_special_tokens=True))
    with build(folder, task="seq2seq").as_base() as view:
        assert view.generate_many(TEXTS, max_new_tokens=6) == expected
        assert view.generate(TEXTS[1], max_new_tokens=6) == expected[1]


def test_an_adapters_task_type_decides_the_head(build: Any, t5: Path, adapter: Path) -> None:
    model, tokenizer = fresh_model(t5, AUTO, adapter)
    backend = build(t5, adapter)
    with backend.as_finetuned() as tuned, backend.as_base() as plain:
        found = tuned.logprobs_of(PAIRS)
        assert not np.allclose(found, plain.logprobs_of(PAIRS), atol=1e-3)
        assert type(tuned.model).__name__ == "PeftModelForSeq2SeqLM"
    assert np.allclose(found, [_alone(model, tokenizer, *pair) for pair in PAIRS], atol=1e-4)


def test_a_prompt_adapter_is_read_as_peft_reads_it(build: Any, t5: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    from tests.tiny import save_adapter

    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1)
    folder = save_adapter(tmp_path, t5, config, auto=AUTO)
    model, tokenizer = fresh_model(t5, AUTO, folder)
    with build(t5, folder).as_finetuned() as view:
        found = view.logprobs_of(PAIRS)
    assert np.allclose(found, [_alone(model, tokenizer, *pair) for pair in PAIRS], atol=1e-4)


def test_samples_depend_on_the_seed_and_not_on_the_batch(build: Any, t5: Path) -> None:
    with build(t5, task="seq2seq").as_base() as view:
        sampled = view.generate_many(TEXTS, max_new_tokens=5, temperature=1.0, seed=3)
        assert sampled == [view.generate(text, max_new_tokens=5, temperature=1.0, seed=3) for text in TEXTS]
        assert sampled != view.generate_many(TEXTS, max_new_tokens=5, temperature=1.0, seed=4)


def test_a_stop_text_ends_what_is_written(build: Any, t5: Path) -> None:
    with build(t5, task="seq2seq").as_base() as view:
        whole = view.generate(TEXTS[0], max_new_tokens=6, temperature=2.0, seed=1)
        second = whole.split()[1]
        assert (
            view.generate(TEXTS[0], max_new_tokens=6, temperature=2.0, seed=1, stop=second)
            == whole.partition(second)[0]
        )


def test_generation_begins_with_the_token_that_the_model_names(build: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "bart", AUTO, ends=True)
    settings = {"decoder_start_token_id": 2, "forced_bos_token_id": 9, "num_beams": 4, "no_repeat_ngram_size": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with build(folder, task="seq2seq").as_base() as view:
        assert {text.split()[0] for text in view.generate_many(TEXTS, max_new_tokens=3)} == {
            view.tokenizer.convert_ids_to_tokens(9)
        }


def test_a_long_prompt_is_cut_as_in_the_harness(build: Any, bart: Path) -> None:
    with build(bart, task="seq2seq").as_base() as view:
        with pytest.warns(SwayWarning, match="1 of the prompts are too long"):
            cut = view.logprob_of("hello " + "sun " * 127, " the sea")
        assert cut == view.logprob_of("sun " * 127, " the sea")


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda view: view.logprob_of("the sun", "sun " * 200), "the completion has 200 tokens.* at most 128"),
        (lambda view: view.logprob_of("the sun", ""), "the completion '' has no tokens"),
        (lambda view: view.generate("the sun", max_new_tokens=500), "max_new_tokens=500 is more than"),
        (lambda view: view.rolling_logprob("the sun"), "rolling_logprob is a question for task='causal'"),
        (lambda view: view.classify(["the sun"]), "a sequence-to-sequence model .*it answers logprob_of, generate"),
    ],
)
def test_what_it_cannot_answer_is_refused(build: Any, bart: Path, ask: Any, text: str) -> None:
    with build(bart, task="seq2seq").as_base() as view, pytest.raises(ScoringError, match=text):
        ask(view)


def test_a_sequence_to_sequence_model_is_told_from_a_causal_one(build: Any, t5: Path) -> None:
    with pytest.raises(Exception, match=r"names T5ForConditionalGeneration, which is loaded with task='seq2seq'"):
        build(t5)


def test_both_sides_pass_the_preflight(build: Any, t5: Path, adapter: Path) -> None:
    assert build(t5, adapter).preflight_finite_check() == (True, "")


def test_answers_of_the_base_are_remembered(t5: Path, adapter: Path) -> None:
    from tests.unit.backends.hf.conftest import spec_of

    recalled: list[int] = []
    builder = HFBuilder(on_recall=lambda name, answers, seconds: recalled.append(answers))
    backend = builder(spec_of(t5, adapter))
    with backend.as_base() as view:
        first = view.logprobs_of(PAIRS), view.generate_many(TEXTS, max_new_tokens=3)
        assert (view.logprobs_of(PAIRS), view.generate_many(TEXTS, max_new_tokens=3)) == first
    backend.close()
    assert sum(recalled) == len(PAIRS) + len(TEXTS)
