"""Tests of the promises that all kinds of backends share; a subclass names its kinds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from pytest_sway.errors import BackendClosedError, ScoringError, ViewClosedError
from pytest_sway.protocols import BatchView, DifferentialBackend, PreflightCheckable, RollingLogprob, TokenDist
from pytest_sway.scores import divergences, exact_match, js_from, multiple_choice

Ask = Callable[[Any], Any]


class Question(NamedTuple):
    """One question, and many of the same sort."""

    items: Sequence[Any]
    one: Callable[[Any, Any], Any]
    many: Callable[[Any, Any], list[Any]]

    def of_one(self, view: Any) -> Any:
        return self.one(view, self.items[0])

    def of_many(self, view: Any) -> Any:
        return self.many(view, self.items)

    def of_none(self, view: Any) -> Any:
        return self.many(view, [])


TEXTS = ("the sun is", "a cat sat", "the sun is warm", "on the mat")
QUESTIONS = {
    "logprob": Question(
        [("the sun is", " warm"), ("the sun", " is cold"), ("a cat", " sat"), ("the sun is", " warm and")],
        lambda view, pair: view.logprob_of(*pair),
        lambda view, pairs: view.logprobs_of(pairs),
    ),
    "rolling": Question(TEXTS, lambda view, t: view.rolling_logprob(t), lambda view, all_: view.rolling_logprobs(all_)),
    "dist": Question(
        TEXTS,
        lambda view, prompt: view.next_token_dist(prompt, top_k=3),
        lambda view, prompts: view.next_token_dists(prompts, top_k=3),
    ),
    "text": Question(
        TEXTS,
        lambda view, prompt: view.generate(prompt, max_new_tokens=3),
        lambda view, prompts: view.generate_many(prompts, max_new_tokens=3),
    ),
}

WITHOUT_MEANING: list[tuple[Ask, str]] = [
    (lambda view: view.logprob_of("the \ud800", " sun"), r"holds half a character \('\\ud800' at position 4\)"),
    (lambda view: view.logprob_of([{"role": "user", "content": "\ud800"}], " sun"), "holds half a character"),
    (lambda view: view.rolling_logprob("the \ud800"), "holds half a character"),
    (lambda view: view.next_token_dist("the \ud800"), "holds half a character"),
    (lambda view: view.generate("the \ud800", max_new_tokens=1), "holds half a character"),
    (lambda view: view.next_token_dists("the sun"), "expected a list of prompts; found 'the sun'"),
    (lambda view: view.rolling_logprobs("the sun"), "expected a list of texts; found 'the sun'"),
    (lambda view: view.logprobs_of(None), "expected a list of pairs of a prompt and a completion; found None"),
    (lambda view: view.generate_many("the sun", max_new_tokens=1), "expected a list of prompts"),
    (lambda view: view.logprobs_of(("a", "b")), "expected a pair of a prompt and a completion; found 'a'"),
    (lambda view: view.logprobs_of([("a", "b", "c")]), "expected a pair of a prompt and a completion; found .*"),
    (lambda view: view.logprobs_of([5]), "expected a pair of a prompt and a completion; found 5"),
    (lambda view: view.logprob_of("a", None), "expected a pair of a prompt and a completion; found .*"),
    (lambda view: view.logprob_of("the sun", ""), "nothing to score"),
    (lambda view: view.rolling_logprob(None), "expected a text to score; found None"),
    (lambda view: view.next_token_dist("the sun", top_k=0), "top_k must be at least 1, not 0"),
    (lambda view: view.next_token_dists([], top_k=0), "top_k must be at least 1, not 0"),
    (lambda view: view.generate("a", max_new_tokens=0), "max_new_tokens must be at least 1, not 0"),
    (lambda view: view.generate("a", max_new_tokens=1, temperature=float("nan")), "temperature must be 0 or more"),
    (lambda view: view.generate_many(["a"], max_new_tokens=1, top_p=2.0), "top_p must be over 0 and at most 1"),
    (lambda view: view.generate_many(["a", "b"], max_new_tokens=1, seed=[1]), "there are 2 prompts and 1 seeds"),
    (lambda view: view.generate_many(["a", "b"], max_new_tokens=1, seed=np.arange(3)), "2 prompts and 3 seeds"),
    (
        lambda view: view.generate_many(["a", "b"], max_new_tokens=1, seed="12"),
        "a seed is a whole number of .*; found '12'",
    ),
    (lambda view: view.generate("a", seed=None), "a seed is a whole number of at most 64 bits; found None"),
    (lambda view: view.generate_many(["a", "b"], seed=[1, 0.5]), "a seed is a whole number .*; found 0.5"),
    (lambda view: view.generate("a", seed=2**64), "a seed is a whole number of at most 64 bits; found 1844"),
    (lambda view: view.next_token_dist("a", top_k="5"), "top_k must be a whole number, not '5'"),
    (lambda view: view.generate("a", max_new_tokens="5"), "max_new_tokens must be a whole number, not '5'"),
    (lambda view: view.generate("a", top_k=-1), r"top_k must be 0 \(all tokens\) or more, not -1"),
    (lambda view: view.generate("a", min_p=2), "min_p must be from 0 to 1, not 2.0"),
    (lambda view: view.generate_many(["a"], repetition_penalty=0.0), "repetition_penalty must be over 0; 1 is none"),
    (lambda view: view.generate("a", stop=5), "stop must be a text or a list of texts, not 5"),
    (lambda view: view.generate_many(["a"], stop=["b", ""]), "each text of stop must be a text that is not empty"),
    (lambda view: view.render([{"role": "user"}]), "message"),
    (lambda view: view.next_token_dist(5), "messages"),
    (lambda view: view.rolling_logprob(["a", "b"]), r"expected a text to score; .* use rolling_logprobs\(texts\)"),
    (lambda view: view.logprob_of(["a", "b"], "c"), r"found the texts .*\. To ask many at once, use logprobs_of"),
    (lambda view: view.generate(["a", "b"], max_new_tokens=1), r"found the texts .* generate_many\(prompts\)"),
]

CALLS: dict[str, Ask] = {
    "render": lambda view: view.render([{"role": "user", "content": "the sun"}]),
    **{f"{name} of one": question.of_one for name, question in QUESTIONS.items()},
    **{f"{name} of many": question.of_many for name, question in QUESTIONS.items()},
    **{f"{name} of none": question.of_none for name, question in QUESTIONS.items()},
}


class Agreement:
    """Tests of the fixtures ``backend``, which has two sides, and ``fresh``, which a test may close."""

    @pytest.fixture
    def view(self, backend: Any) -> Iterator[Any]:
        with backend.as_finetuned() as view:
            yield view

    def test_it_has_what_the_protocols_say(self, backend: Any, view: Any) -> None:
        assert backend.safe_for_concurrent_views is True
        assert isinstance(backend.cache_identity(), str)
        assert all(isinstance(size, int) for size in backend.sizes().values())
        assert backend.preflight_finite_check() == (True, "")
        assert isinstance(backend, DifferentialBackend)
        assert isinstance(backend, PreflightCheckable)
        assert isinstance(view, BatchView)

    def test_views_are_named_as_in_dlm_sway(self, backend: Any) -> None:
        with backend.as_base() as base, backend.as_finetuned() as tuned:
            assert (base.id, tuned.id) == ("base", "ft")

    def test_who_forgets_with_is_told_of_it(self, backend: Any) -> None:
        with pytest.raises(AttributeError, match=r"write `with backend.as_base\(\.\.\.\) as view: view\.logprob_of`"):
            backend.as_base().logprob_of("a", "b")
        with pytest.raises(AttributeError, match=r"`with backend\.as_finetuned\(\) as view: view\.generate`"):
            backend.generate("a", max_new_tokens=1)
        with pytest.raises(AttributeError, match=r"has no attribute 'generated'$"):
            _ = backend.generated

    def test_who_opens_a_backend_or_a_view_that_there_is_not_is_told_of_its_views(self, backend: Any) -> None:
        with pytest.raises(TypeError, match=r"a backend needs no `with`: .* views: `with backend\.as_finetuned\(\)"):
            backend.__enter__()
        with pytest.raises(AttributeError, match=r"has no attribute 'as_tuned'\. It has as_base, as_finetuned"):
            backend.as_tuned()

    @pytest.mark.parametrize("name", QUESTIONS)
    def test_one_question_is_many_of_one(self, view: Any, name: str) -> None:
        question = QUESTIONS[name]
        for item in question.items:
            assert_equal(question.many(view, [item]), [question.one(view, item)])

    @pytest.mark.parametrize("name", QUESTIONS)
    def test_answers_come_in_the_order_of_the_questions(self, view: Any, name: str) -> None:
        question, drawn = QUESTIONS[name], random.Random(0)
        alone = {item: question.one(view, item) for item in question.items}
        for count in (1, 3, 6):
            asked = drawn.choices(question.items, k=count)  # in any order, some repeatedly
            assert_equal(question.many(view, asked), [alone[item] for item in asked])

    @pytest.mark.parametrize("name", QUESTIONS)
    def test_questions_come_from_any_iterable(self, view: Any, name: str) -> None:
        question = QUESTIONS[name]
        assert_equal(question.many(view, iter(question.items)), question.many(view, list(question.items)))
        assert question.many(view, []) == []

    def test_all_tokens_of_a_text_are_scored_by_default(self, view: Any) -> None:
        assert_equal([view.rolling_logprob("the sun is")], [view.rolling_logprob("the sun is", prefix=True)])

    def test_answers_have_the_types_and_shapes_that_are_documented(self, view: Any) -> None:
        rolling, dist = view.rolling_logprob("the sun is"), view.next_token_dist("the sun", top_k=2)
        assert isinstance(view.logprob_of("the sun", " is"), float)
        assert (rolling.token_ids.dtype, rolling.logprobs.dtype) == (np.int64, np.float32)
        assert rolling.num_tokens == rolling.token_ids.size == rolling.logprobs.size + 1
        assert rolling.total_logprob == pytest.approx(float(rolling.logprobs.sum()), abs=1e-5)
        assert (dist.token_ids.dtype, dist.logprobs.dtype) == (np.int64, np.float32)
        assert dist.token_ids.shape == dist.logprobs.shape == (2,)
        assert dist.logprobs[0] >= dist.logprobs[1]
        assert dist.tail_logprob is None or dist.tail_logprob <= 0.0

    def test_it_answers_what_a_comparison_scores(self, backend: Any, view: Any) -> None:
        asked = [(prompt, ["warm", "cold", "red"], 0) for prompt in TEXTS]
        with backend.as_base() as base:
            for exact in divergences(TEXTS, view, base):
                assert 0.0 <= exact.js <= exact.js + exact.js_tail <= math.log(2) + 1e-6
                assert 0.0 <= exact.js <= exact.kl
            assert js_from(base)(base, list(TEXTS)) == pytest.approx([0.0] * len(TEXTS), abs=1e-6)
        assert set(multiple_choice("acc_norm")(view, asked)) <= {0.0, 1.0}
        pairs = [(prompt, view.generate(prompt, max_new_tokens=2)) for prompt in TEXTS]
        assert exact_match(max_new_tokens=2)(view, pairs) == [1.0] * len(TEXTS)

    @pytest.mark.parametrize(("ask", "sentence"), WITHOUT_MEANING)
    def test_a_question_without_meaning_is_refused(self, view: Any, ask: Ask, sentence: str) -> None:
        with pytest.raises(ScoringError, match=sentence):
            ask(view)

    def test_a_text_ends_before_the_first_stop_text(self, view: Any) -> None:
        whole = view.generate_many(TEXTS, max_new_tokens=6)
        middle = whole[0][len(whole[0]) // 2 :][:3]
        for stop in (middle, ["nowhere", middle]):
            expected = [text.partition(middle)[0] for text in whole]
            assert view.generate_many(TEXTS, max_new_tokens=6, stop=stop) == expected
            assert view.generate(TEXTS[0], max_new_tokens=6, stop=stop) == expected[0]

    def test_every_kind_takes_the_settings_of_sampling(self, view: Any) -> None:
        settings = {"max_new_tokens": 4, "temperature": 1.0, "seed": 3, "repetition_penalty": 1.3}
        for extra in ({"top_k": 2}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}):
            together = view.generate_many(TEXTS, **settings, **extra)
            assert together == [view.generate(text, **settings, **extra) for text in TEXTS]

    def test_one_token_left_is_the_most_probable_one(self, view: Any) -> None:
        greedy = view.generate(TEXTS[0], max_new_tokens=4)
        for left in ({"top_k": 1}, {"min_p": 1.0}):
            assert view.generate(TEXTS[0], max_new_tokens=4, temperature=1.5, seed=2, **left) == greedy

    def test_an_unknown_keyword_is_refused_with_those_that_there_are(self, view: Any) -> None:
        sentence = r"generate\(\) has no keyword 'num_beams'; it has max_new_tokens, .*, repetition_penalty\. For other"
        with pytest.raises(TypeError, match=rf"^{sentence} .* view\.model\.generate"):
            view.generate("a", num_beams=4)
        with pytest.raises(TypeError, match=r"^generate_many\(\) .*\. max_new_tokens is the most tokens to add\."):
            view.generate_many(["a"], max_tokens=4)
        with pytest.raises(
            TypeError, match=r"\. Chat\(messages, \.\.\.\) takes what is for the chat template, and is a"
        ):
            view.generate([{"role": "user", "content": "a"}], tools=[])

    def test_a_view_ends_with_its_block(self, backend: Any) -> None:
        with backend.as_base() as view:
            pass
        view.close()
        sentence = r"^the view 'base' was used after its `with` block\. Keep what it returned, or open another view\.$"
        for call in CALLS.values():
            with pytest.raises(ViewClosedError, match=sentence):
                call(view)
        assert repr(view).endswith("'base', closed>")
        with backend.as_base() as view:
            assert view.logprob_of("the sun", " is") < 0.0

    def test_a_closed_backend_says_so_whatever_it_is_asked(self, fresh: Any) -> None:
        with fresh.as_base() as view:
            fresh.close()
            fresh.close()
            sentence = r"was used after it was closed, by eviction or at the end of the session\. Ask for it again"
            asked = [partial(question.of_one, view) for question in QUESTIONS.values()]
            for ask in (*asked, fresh.as_base().__enter__, fresh.preflight_finite_check):
                with pytest.raises(BackendClosedError, match=sentence):
                    ask()
        assert repr(fresh).endswith(", closed>")


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    """Fail unless answers are equal, within the tolerance between one question and many."""
    assert [type(answer) for answer in found] == [type(answer) for answer in expected]
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(ours, RollingLogprob | TokenDist):
            np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)
        else:
            assert ours == (theirs if isinstance(ours, str) else pytest.approx(theirs, abs=1e-3))
