"""Questions: their scores on a view, and which of them share a prompt."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pytest_sway.comparison.questions import Questions
from pytest_sway.errors import ComparisonError

PAIRS = [("the sun rises in the", " east"), ("the sun sets in the", " west")]
TEXTS = ["the sun rises", "the sun sets"]


class OneByOne:
    """A view without batch methods, like dlm-sway's."""

    def logprob_of(self, prompt: Any, completion: str) -> float:
        return -float(len(completion))

    def rolling_logprob(self, text: str) -> Any:
        words = text.split()
        return SimpleNamespace(logprobs=np.full(len(words), -0.5), total_logprob=-0.5 * len(words))


VIEW: Any = OneByOne()


def test_a_view_without_methods_for_many_is_asked_one_by_one() -> None:
    assert Questions(PAIRS).scored_by(VIEW, "it") == [-5.0, -5.0]
    assert Questions(TEXTS).scored_by(VIEW, "it") == [-0.5, -0.5]


def test_questions_may_come_from_a_generator() -> None:
    assert Questions(pair for pair in PAIRS).asked == PAIRS


def test_prompts_may_be_messages() -> None:
    conversation = [[{"role": "user", "content": content}] for content in ("hello", "hi")]
    questions = Questions([(messages, " you") for messages in conversation])
    assert questions.unit == "nats an answer"
    assert questions.clusters() == [[0], [1]]


def test_equal_prompts_are_one_cluster() -> None:
    questions = Questions([("a", " x"), ("b", " x"), ("a", " y"), ["b", " z"], ("c", " x")])
    assert questions.clusters() == [[0, 2], [1, 3], [4]]


def test_with_a_score_anything_is_a_question() -> None:
    asked: list[Any] = [{"number": 1}, {"number": 2}, ("a", "b", "c"), "a text", object()]
    questions = Questions(asked, lambda view, questions: np.arange(len(questions)))
    assert questions.scored_by(VIEW, "it") == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert questions.unit == "points"
    assert len(questions.clusters()) == 5


def test_a_score_may_return_booleans_and_numpy_numbers() -> None:
    assert Questions(TEXTS, lambda view, asked: [True, np.float32(0.5)]).scored_by(VIEW, "it") == [1.0, 0.5]


def test_a_score_cannot_change_the_questions_of_the_other_side() -> None:
    questions = Questions(TEXTS, lambda view, asked: [float(len(asked.pop())) for _ in range(2)])
    assert questions.scored_by(VIEW, "one") == questions.scored_by(VIEW, "other")


def test_an_error_of_a_score_is_the_users_own() -> None:
    def broken(view: Any, asked: list[Any]) -> list[float]:
        raise ZeroDivisionError("of the user's")

    with pytest.raises(ZeroDivisionError, match="of the user's"):
        Questions(TEXTS, broken).scored_by(VIEW, "it")


@pytest.mark.parametrize("score", [None, "1", float("inf"), [1.0], 10**400, -1e101], ids=repr)
def test_a_score_that_is_not_a_finite_number_is_refused_with_its_question(score: Any) -> None:
    questions = Questions(TEXTS, lambda view, asked: [1.0, score])
    with pytest.raises(ComparisonError, match=r"^the score of questions\[1\] \('the sun sets'\) is .* for it; a"):
        questions.scored_by(VIEW, "it")


@pytest.mark.parametrize("again", [("the sun rises in the", " east"), ["the sun rises in the", " east"]])
def test_a_repeated_question_is_refused(again: Any) -> None:
    with pytest.raises(ComparisonError, match=r"^questions\[2\] repeats questions\[0\]"):
        Questions([*PAIRS, again])


def test_a_set_has_one_digest_in_every_process() -> None:
    words = {f"word {n}" for n in range(9)}
    script = (
        "from pytest_sway.comparison.questions import Questions;"
        f" print(Questions([('a', {words!r}), ('b', {words!r})], score=lambda view, asked: asked).digests())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "123"
    }
    assert len(told) == 1


def test_large_arrays_are_told_apart_by_all_of_their_numbers() -> None:
    one, other = np.zeros((64, 64)), np.zeros((64, 64))
    other[32, 32] = 1.0
    images = Questions([("a", {"image": one}), ("a", {"image": other}), ("b", one)], score=lambda view, asked: asked)
    assert len(set(images.digests())) == 3
    with pytest.raises(ComparisonError, match=r"questions\[1\] repeats questions\[0\]"):
        Questions([one, one.copy(), other], score=lambda view, asked: asked)


def test_the_name_of_a_score_has_its_arguments() -> None:
    def says_it(view: Any, asked: list[Any], length: int, model: object = None) -> list[float]:
        return [float(length)] * len(asked)

    one = Questions(PAIRS, score=partial(says_it, length=8, model=object()))
    assert one.score == "says_it(length=8, model=<object object>)"
    assert Questions(PAIRS, score=partial(says_it, length=64)).score != one.score


def test_a_tensor_that_cannot_list_its_numbers_is_known_by_its_repr() -> None:
    class Sparse:
        def __init__(self, name: str) -> None:
            self.name = name

        def tolist(self) -> list[float]:
            raise NotImplementedError

        def __repr__(self) -> str:
            return self.name

    asked = Questions([Sparse("a"), Sparse("b")], score=lambda view, asked: asked)
    assert len(set(asked.digests())) == 2


def test_texts_with_other_tokens_on_the_other_side_are_refused() -> None:
    class Letters(OneByOne):
        def rolling_logprob(self, text: str) -> Any:
            return super().rolling_logprob(" ".join(text) if text == TEXTS[1] else text)

    questions, letters = Questions(TEXTS), cast(Any, Letters())
    questions.scored_by(VIEW, "words")
    with pytest.raises(ComparisonError, match=r"^questions\[1\] has 3 tokens on one side and 10 on the other, whose"):
        questions.scored_by(letters, "letters")
