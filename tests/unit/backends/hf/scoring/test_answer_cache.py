"""The answer cache: when it answers, when it must not, and equal numbers in both cases."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.scoring.answer_cache import AnswerCache
from tests.tiny import TEXT, make_tokenizer
from tests.unit.backends.hf.conftest import spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT, ANSWER = "the sun rises in the", " east"
TEXTS = [TEXT, "the moon", "a fox sat by the window"]

QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "logprob_of": lambda view: view.logprob_of(PROMPT, ANSWER),
    "logprobs_of": lambda view: view.logprobs_of([(PROMPT, " east"), (PROMPT, " west"), ("the moon", " sets")]),
    "rolling_logprobs": lambda view: [rolling.logprobs.tolist() for rolling in view.rolling_logprobs(TEXTS)],
    "next_token_dists": lambda view: [dist.logprobs.tolist() for dist in view.next_token_dists(TEXTS, top_k=5)],
    "generate": lambda view: view.generate(PROMPT, max_new_tokens=4),
    "generate_many": lambda view: view.generate_many(TEXTS, max_new_tokens=4, temperature=1.0, seed=3),
}


@pytest.fixture
def recalled() -> Counter[str]:
    """The number of cached answers that each base gave."""
    return Counter()


@pytest.fixture
def builder(loads: list[str], recalled: Counter[str]) -> HFBuilder:
    def count(name: str, answers: int, seconds: float) -> None:
        assert seconds > 0.0
        recalled[name] += answers

    return HFBuilder(on_base_load=lambda name, seconds: loads.append(name), on_recall=count)


# --- the memory -----------------------------------------------------------------------------------------------------


def _never() -> list[Any]:
    raise AssertionError("it was computed again")


def test_a_question_is_computed_once() -> None:
    memory = AnswerCache()
    assert memory.answers(("a", 1), lambda: [1.5]) == [1.5]
    assert memory.answers(("a", 1), _never) == [1.5]
    assert memory.answers(("a", 2), lambda: [2.5]) == [2.5]


def test_what_is_recalled_is_the_askers_own() -> None:
    memory = AnswerCache()
    memory.answers("question", lambda: [np.zeros(3)])[0][:] = 1
    memory.answers("question", _never)[0][:] = 2
    np.testing.assert_array_equal(memory.answers("question", _never)[0], np.zeros(3))


def test_it_takes_no_more_bytes_than_it_may_and_forgets_what_was_not_asked_for_longest() -> None:
    memory = AnswerCache(max_bytes=3000)
    for question in ("a", "b"):
        memory.answers(question, lambda: ["x" * 1000])
    memory.answers("a", _never)
    memory.answers("c", lambda: ["x" * 1000])
    assert memory.nbytes <= 3000
    assert len(memory) == 2
    memory.answers("a", _never)
    memory.answers("c", _never)
    assert memory.answers("b", lambda: ["again"]) == ["again"]


@pytest.mark.parametrize("numbers", [np.zeros(10_000), np.zeros(20_000)[::2]], ids=["owned", "a view"])
def test_an_array_counts_once(numbers: Any) -> None:
    memory = AnswerCache()
    memory.answers("question", lambda: [numbers])
    assert 80_000 <= memory.nbytes < 82_000


def test_an_answer_larger_than_all_of_it_drops_nothing() -> None:
    memory = AnswerCache(max_bytes=2000)
    memory.answers("small", lambda: ["x"])
    memory.answers("large", lambda: ["x" * 3000])
    assert len(memory) == 1
    memory.answers("small", _never)


def test_it_can_forget_all() -> None:
    memory = AnswerCache()
    memory.answers("a", lambda: [1])
    memory.forget()
    assert (memory.nbytes, len(memory)) == (0, 0)
    assert memory.answers("a", lambda: [2]) == [2]


def test_what_fails_is_not_remembered() -> None:
    memory = AnswerCache()
    with pytest.raises(AssertionError, match="computed again"):
        memory.answers("a", _never)
    assert memory.answers("a", lambda: [1]) == [1]


# --- a base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_all_adapters_of_a_base_share_its_answers(
    build: Any, base: Path, adapter: Path, other_adapter: Path, recalled: Counter[str], question: str
) -> None:
    ask = QUESTIONS[question]
    with build(base, adapter).as_base() as view:
        first = ask(view)
    assert not recalled
    for backend in (build(base, other_adapter), build(base)):
        with backend.as_base() as view:
            assert ask(view) == first
    assert recalled[str(base)] == 2 * (len(first) if isinstance(first, list) else 1)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_memory_changes_no_bit(base: Path, adapter: Path, question: str) -> None:
    """For any earlier questions, and any other texts in the batch."""
    ask, answers = QUESTIONS[question], []
    for score_cache in (0, 2**20):
        backend = HFBuilder(score_cache=score_cache)(spec_of(base, adapter))
        with backend.as_base() as view:
            given = []
            for text in TEXTS:
                given.append(view.rolling_logprob(text).logprobs.tolist())
                given.append(view.logprob_of(PROMPT, ANSWER + " " + text))
            given += [ask(view), ask(view)]
            given += [rolling.logprobs.tolist() for rolling in view.rolling_logprobs(TEXTS[::-1])]
        backend.close()
        answers.append(given)
    assert answers[0] == answers[1]


def test_other_views_than_the_bases_compute_each_time(
    build: Any, base: Path, adapter: Path, recalled: Counter[str]
) -> None:
    backend = build(base, adapter)
    for opened in (
        backend.as_finetuned,
        lambda: backend.as_scaled_adapter(0.5),
        lambda: backend.as_null_adapter(1),
    ):
        with opened() as view:
            for ask in QUESTIONS.values():
                ask(view)
                ask(view)
    assert not recalled


def test_a_whole_fine_tuned_model_remembers_its_own_answers(
    build: Any, base: Path, tmp_path: Path, recalled: Counter[str]
) -> None:
    from tests.tiny import make_base

    tuned = make_base(tmp_path / "tuned", seed=5)
    backend = build(base, finetuned=str(tuned))
    with backend.as_base() as plain, backend.as_finetuned() as view:
        before = plain.logprob_of(PROMPT, ANSWER), view.logprob_of(PROMPT, ANSWER)
        assert before[0] != before[1]
        assert (plain.logprob_of(PROMPT, ANSWER), view.logprob_of(PROMPT, ANSWER)) == before
    assert recalled == {str(base): 1, str(tuned): 1}


def test_another_question_is_not_the_same(build: Any, base: Path, recalled: Counter[str]) -> None:
    with build(base).as_base() as view:
        for top_k in (1, 2):
            assert len(view.next_token_dist(PROMPT, top_k=top_k).logprobs) == top_k
        for tokens in (1, 2):
            view.generate(PROMPT, max_new_tokens=tokens)
        for temperature in (0.5, 1.0):
            view.generate(PROMPT, max_new_tokens=2, temperature=temperature)
        for seed in (1, 2):
            view.generate(PROMPT, max_new_tokens=2, temperature=2.0, seed=seed)
        view.logprob_of(PROMPT, " east west")
        view.logprob_of(PROMPT + " east", " west")
        assert not recalled


def test_the_same_tokens_in_other_precision_are_another_question(
    build: Any, base: Path, recalled: Counter[str]
) -> None:
    import torch

    with build(base).as_base() as view:
        plain = view.logprob_of(PROMPT, ANSWER)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert view.logprob_of(PROMPT, ANSWER) != plain
        assert not recalled


@pytest.mark.parametrize("part", ["cuda", "mkldnn"])
def test_the_same_tokens_in_other_precision_of_float32_are_another_question(
    build: Any, base: Path, recalled: Counter[str], part: str
) -> None:
    import torch

    settings: Any = getattr(getattr(torch.backends, part), "matmul", None)
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("torch has this setting since 2.9")
    with build(base).as_base() as view:
        view.logprob_of(PROMPT, ANSWER)
        before, settings.fp32_precision = settings.fp32_precision, "tf32" if part == "cuda" else "bf16"
        try:
            view.logprob_of(PROMPT, ANSWER)
        finally:
            settings.fp32_precision = before
        assert not recalled


def test_whoever_watches_the_computing_sees_it(build: Any, base: Path, recalled: Counter[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with build(base).as_base() as view:
        view.logprob_of(PROMPT, ANSWER)
        with FlopCounterMode(display=False) as counter:
            view.logprob_of(PROMPT, ANSWER)
        assert counter.get_total_flops() > 0
        assert not recalled


def test_a_base_that_is_loaded_anew_remembers_nothing(
    build: Any, base: Path, loads: list[str], recalled: Counter[str]
) -> None:
    for _ in range(2):
        backend = build(base)
        with backend.as_base() as view:
            view.logprob_of(PROMPT, ANSWER)
        backend.close()
    assert len(loads) == 2
    assert not recalled


# --- a base that somebody changes -----------------------------------------------------------------------------------


def _scale_weight(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    with torch.no_grad():
        view.model.get_input_embeddings().weight.mul_(1.5)


def _scale_data(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view.model.get_input_embeddings().weight.data.mul_(1.5)


def _patch_class(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(view.model.get_input_embeddings())
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, ids: forward(self, ids) * 1.5)


def _patch_attention(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    attend: Any = AttentionInterface._global_mapping["sdpa"]
    scaled = lambda *args, **kwargs: (attend(*args, **kwargs)[0] * 1.5, None)  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", scaled)


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "written": _scale_weight,
    "written behind torch's back": _scale_data,
    "a class's forward": _patch_class,
    "an attention function": _patch_attention,
}


@pytest.mark.usefixtures("exposed")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_base_never_answers_from_memory(
    build: Any, base: Path, adapter: Path, recalled: Counter[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    with build(base, adapter).as_base() as view:
        before = view.logprob_of(PROMPT, ANSWER)
        CHANGES[change](view, monkeypatch)
        changed = view.logprob_of(PROMPT, ANSWER)
        assert changed != before
        assert view.logprob_of(PROMPT, ANSWER) == changed
    assert not recalled


def test_while_a_tests_tokenizer_is_changed_the_base_computes_as_before_and_remembers_nothing(
    build: Any, base: Path, adapter: Path, recalled: Counter[str]
) -> None:
    from tokenizers import normalizers

    backend = build(base, adapter)
    with backend.as_base() as view:
        before = view.logprob_of(PROMPT, ANSWER)
        view.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("sun", "moon")
        assert view.logprob_of(PROMPT, ANSWER) == before
    assert not recalled
    assert backend.changes() == ["tokenizer: its normalizer changed"]


def test_what_a_test_does_to_its_own_model_does_not_keep_the_base_from_remembering(
    build: Any, base: Path, recalled: Counter[str]
) -> None:
    with build(base).as_base() as view:
        before = view.logprob_of(PROMPT, ANSWER)
        _scale_data(view, pytest.MonkeyPatch())
        view.model.register_forward_hook(lambda *args: None)
        assert view.logprob_of(PROMPT, ANSWER) == before
    assert recalled == {str(base): 1}


def test_what_a_changed_base_answered_is_not_remembered(
    build: Any, base: Path, recalled: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(base).as_base() as view:
        _patch_class(view, monkeypatch)
        changed = view.logprob_of(PROMPT, ANSWER)
        monkeypatch.undo()
        assert view.logprob_of(PROMPT, ANSWER) != changed
    assert not recalled


def test_a_base_that_was_put_right_again_remembers_what_it_answers_from_then_on(
    build: Any, base: Path, recalled: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = build(base)
    with backend.as_base() as view:
        _patch_class(view, monkeypatch)
        view.logprob_of(PROMPT, ANSWER)
        assert len(backend.changes()) == 1, "which puts it right"
        right = view.logprob_of(PROMPT, ANSWER)
        assert view.logprob_of(PROMPT, ANSWER) == right
    assert recalled == {str(base): 1}
    assert backend.changes() == []


def test_the_base_view_of_an_adapter_with_a_tokenizer_of_its_own_answers_from_the_bases_memory(
    build: Any, base: Path, adapter: Path, tmp_path: Path, recalled: Counter[str]
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    make_tokenizer(folder, extra=("quark",))
    with build(base).as_base() as plain, build(base, folder).as_base() as view:
        assert plain.logprob_of("quark", ANSWER) == view.logprob_of("quark", ANSWER)
    assert recalled == {str(base): 1}
