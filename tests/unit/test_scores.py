"""Scores besides log-probabilities: tiny models against torch, values by hand, and errors for bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import numpy as np
import pytest
from pytest_httpserver import HTTPServer

from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.comparison.questions import Questions
from pytest_sway.errors import ComparisonError, ScoringError, ViewClosedError
from pytest_sway.protocols import TokenDist
from pytest_sway.scores import Metric, divergences, exact_match, js_from, kl_from, multiple_choice
from pytest_sway.spec.model_spec import ModelSpec
from tests.tiny import make_adapter, make_base, make_tokenizer
from tests.unit.backends.api import toy

PROMPTS = ["the sun rises in the", "a cat sat on the", "paris is the capital of", "hello"]


@pytest.fixture(scope="module")
def cache() -> Iterator[BackendCache]:
    cache = BackendCache(max_size=3)
    yield cache
    cache.shutdown()


@pytest.fixture(scope="module")
def backend(cache: BackendCache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    base = make_base(tmp_path_factory.mktemp("base"))
    with cache.lease({"base": base, "adapter": make_adapter(tmp_path_factory.mktemp("adapter"), base)}) as backend:
        yield backend


@pytest.fixture(scope="module")
def base(backend: Any) -> Iterator[Any]:
    with backend.as_base() as view:
        yield view


@pytest.fixture(scope="module")
def tuned(backend: Any) -> Iterator[Any]:
    with backend.as_finetuned() as view:
        yield view


# --- divergences ------------------------------------------------------------------------------------------------------


def test_divergences_are_torchs_over_the_whole_vocabulary(base: Any, tuned: Any) -> None:
    import torch

    found = divergences(PROMPTS, tuned, base)
    for prompt, ours in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            p, q = (view.model(input_ids=ids).logits[0, -1].double().log_softmax(-1) for view in (tuned, base))
        middle = torch.log((p.exp() + q.exp()) / 2)
        kl, *halves = (
            float(torch.nn.functional.kl_div(reference, side, reduction="sum", log_target=True))
            for side, reference in ((p, q), (p, middle), (q, middle))
        )
        assert ours == pytest.approx((kl, 0.0, sum(halves) / 2, 0.0), rel=1e-4)


def test_cut_distributions_bound_the_divergence_of_whole_ones(base: Any, tuned: Any) -> None:
    whole, some = divergences(PROMPTS, tuned, base), divergences(PROMPTS, tuned, base, top_k=20)
    for exact, bound in zip(whole, some, strict=True):
        assert bound.js < exact.js < bound.js + bound.js_tail < math.log(2)
        assert bound.kl < exact.kl < bound.kl + bound.kl_tail


def test_many_prompts_are_answered_in_their_order(base: Any, tuned: Any) -> None:
    many = [
        f"{first} {then}" for first in PROMPTS for then in ("the", "a", "sun", "moon", "cat", "dog", "sea", "sky", "up")
    ]
    found = divergences(many, tuned, base)
    assert len(found) == 36
    for at in (0, 31, 32, 35):
        assert found[at] == pytest.approx(divergences([many[at]], tuned, base)[0], rel=1e-4)
    assert divergences([], tuned, base) == []


def test_the_divergence_of_a_view_from_itself_is_0(base: Any) -> None:
    assert divergences(PROMPTS, base, base) == [(0.0, 0.0, 0.0, 0.0)] * len(PROMPTS)


def test_more_is_closer_to_the_reference(base: Any, tuned: Any) -> None:
    found = divergences(PROMPTS, tuned, base)
    assert kl_from(base)(tuned, PROMPTS) == pytest.approx([-each.kl for each in found], rel=1e-4)
    assert js_from(base)(tuned, PROMPTS) == pytest.approx([-each.js for each in found], rel=1e-4)
    assert list(js_from(base)(base, PROMPTS)) == [0.0] * len(PROMPTS)


def test_a_server_that_gives_20_tokens_bounds_the_divergence_of_its_models() -> None:
    with HTTPServer(threaded=True) as server:
        url = toy.Toy(server, "vllm").url
        backend = cast(Any, Builder()(ModelSpec(kind="api", base="base", finetuned="tuned", endpoint=url)))
        with backend.as_base() as base, backend.as_finetuned() as tuned:
            (found,) = divergences(["the sun"], tuned, base)
        backend.close()
    p, q = (
        np.exp(list(toy.distribution(model, [toy.BOS, "the", " sun"]).values())).astype(np.float64)
        for model in ("tuned", "base")
    )
    middle = (p + q) / 2
    js = float((p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()) / 2
    assert 0.0 < found.js < js < found.js + found.js_tail
    assert 0.0 < found.kl < float((p * np.log(p / q)).sum()) < found.kl_tail


def test_a_view_without_batch_methods_is_measured(base: Any) -> None:
    class OneByOne:
        id = "mine"

        def next_token_dist(self, prompt: str, *, top_k: int = 256) -> TokenDist:
            dist: TokenDist = base.next_token_dist(prompt, top_k=top_k)
            return dist

    mine: Any = OneByOne()
    for found in divergences(PROMPTS, mine, base):
        assert found == pytest.approx((0.0, 0.0, 0.0, 0.0), abs=1e-6)


@pytest.fixture
def with_a_word_more(cache: BackendCache, tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """Return a view of a model, and the folder of another model with one more token."""
    small = make_base(tmp_path / "small")
    large = make_base(tmp_path / "large", vocab_size=make_tokenizer(tmp_path / "other", extra=("new",)))
    shutil.copytree(tmp_path / "other", large, dirs_exist_ok=True)
    with cache.lease({"base": small}) as one, one.as_base() as reference:
        yield reference, large


def test_a_vocabulary_with_added_tokens_is_comparable(cache: BackendCache, with_a_word_more: tuple[Any, Path]) -> None:
    reference, large = with_a_word_more
    with cache.lease({"base": large}) as other, other.as_base() as view:
        found = divergences(PROMPTS, view, reference)
        assert {each.kl for each in found} == {math.inf}
        assert all(0.0 < each.js < math.log(2) for each in found)
        assert all(math.isfinite(each.kl) for each in divergences(PROMPTS, reference, view))


def test_vocabularies_that_number_tokens_differently_are_refused(
    cache: BackendCache, with_a_word_more: tuple[Any, Path]
) -> None:
    reference, large = with_a_word_more
    tokenizer = json.loads((large / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (large / "tokenizer.json").write_text(json.dumps(tokenizer))
    with (
        cache.lease({"base": large}) as other,
        other.as_base() as view,
        pytest.raises(
            ScoringError, match=r"one has a vocabulary of \d+ tokens, the other of \d+, and their common tokens are not"
        ),
    ):
        divergences(PROMPTS, view, reference)


def test_a_server_that_spells_tokens_is_not_compared_with_numbers(base: Any) -> None:
    spelled = TokenDist(np.array([-5, -9]), np.log(np.array([0.5, 0.4], np.float32)), 0, math.log(0.1))
    server: Any = SimpleNamespace(next_token_dist=lambda prompt, top_k: spelled)
    assert divergences(["a"], server, server)[0].js == 0.0
    with pytest.raises(
        ScoringError, match=r"number their tokens alike; one of them .* only their spelling\. Use one server"
    ):
        divergences(["a"], server, base)


def test_a_reference_that_was_closed_says_so(backend: Any, tuned: Any) -> None:
    with backend.as_base() as base:
        score = js_from(base)
    with pytest.raises(ViewClosedError, match=r"^the view 'base' was used after its `with` block\."):
        score(tuned, PROMPTS)


def test_a_reference_that_is_not_a_view_is_refused_at_once(backend: Any, tuned: Any) -> None:
    with pytest.raises(ScoringError, match=r"between two views, but this is a backend, which has two\. Open the"):
        js_from(backend)
    with pytest.raises(ScoringError, match=r"between two open views; found str: 'baseline'\. Open a view, as in `w"):
        kl_from(cast(Any, "baseline"))
    with pytest.raises(ScoringError, match="found NoneType: None"):
        divergences(PROMPTS, tuned, cast(Any, None))
    with pytest.raises(ScoringError, match="expected a list of prompts; found 'the sun'"):
        divergences("the sun", tuned, tuned)


# --- multiple choice --------------------------------------------------------------------------------------------------


def canned(logprobs: dict[str, float]) -> Any:
    """Return a view with fixed log-probabilities of choices, for every prompt."""
    return SimpleNamespace(logprobs_of=lambda pairs: [logprobs[choice] for _, choice in pairs])


METRICS: tuple[Metric, ...] = get_args(Metric)
QUESTION = ("2 + 2 =", ["vier", "fünf", "zwei und zwei"], 2)
VIEW = canned({" vier": -5.2, " fünf": -6.0, " zwei und zwei": -15.0})
"""By characters, these are -1.3, -1.5 and -1.15 each; by bytes, -1.3, -1.2 and -1.15."""


@pytest.mark.parametrize(("metric", "chosen"), [("acc", 0), ("acc_norm", 2), ("acc_bytes", 2)])
def test_a_metric_ranks_by_the_sum_by_characters_or_by_bytes(metric: Any, chosen: int) -> None:
    questions = [(*QUESTION[:2], label) for label in range(3)]
    assert multiple_choice(metric)(VIEW, questions) == [float(label == chosen) for label in range(3)]


def test_characters_are_not_bytes() -> None:
    view, question = canned({" üü": -3.0, " abc": -4.0}), ("which", ["üü", "abc"], 0)
    assert [multiple_choice(metric)(view, [question]) for metric in METRICS] == [[1.0], [0.0], [1.0]]


def test_of_equally_probable_choices_the_first_counts() -> None:
    view = canned({" a": -1.0, " b": -1.0})
    assert multiple_choice()(view, [("x", ["a", "b"], 0), ("x", ["b", "a"], 0)]) == [1.0, 1.0]


def test_the_delimiter_stands_between_prompt_and_choice_and_does_not_count() -> None:
    view = canned({"好": -1.0, "不好": -1.5})
    questions = [("你", ["好", "不好"], 1)]
    assert multiple_choice("acc", target_delimiter="")(view, questions) == [0.0]
    assert multiple_choice("acc_norm", target_delimiter="")(view, questions) == [1.0]


def test_choices_are_scored_like_logprob_of(tuned: Any) -> None:
    (prompt, *choices) = "the sun rises in the", "east", "west and sets"
    first, second = (tuned.logprob_of(prompt, f" {choice}") for choice in choices)
    assert multiple_choice("acc")(tuned, [(prompt, choices, 0)]) == [float(first >= second)]
    assert multiple_choice("acc_norm")(tuned, [(prompt, choices, 0)]) == [float(first / 4 >= second / 13)]


def test_a_view_without_methods_for_many_is_asked_one_by_one() -> None:
    view = SimpleNamespace(
        logprob_of=lambda prompt, choice: -float(len(prompt + choice)),
        generate=lambda prompt, max_new_tokens: f"{prompt} and {max_new_tokens}",
    )
    assert multiple_choice()(view, [("x", ["long", "short"], 0)]) == [1.0]
    assert exact_match(max_new_tokens=2)(view, [("x", "x and 2"), ("y", "x and 2")]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        (("2 + 2 =", " 4"), r"is \(prompt, choices, label\), such as .*; questions\[1\] is \('2 \+ 2 =', ' 4'\)"),
        ("2 + 2", r"is \(prompt, choices, label\), .*; questions\[1\] is '2 \+ 2'"),
        (("x", "ab", 0), r"expected a list of choices in questions\[1\]; found 'ab'"),
        (("x", [], 0), r"at least 2 choices; questions\[1\] has 0"),
        (("x", ["a"], 0), r"at least 2 choices; questions\[1\] has 1"),
        (("x", ["a", ""], 0), r"not empty; choices\[1\] of questions\[1\] is ''"),
        (("x", ["a", 4], 0), r"not empty; choices\[1\] of questions\[1\] is 4"),
        (("x", ["a", "b", "a"], 0), r"choices\[2\] of questions\[1\] repeats choices\[0\] \('a'\)"),
        (
            ("x", ["a", " b"], 0),
            r"choices\[1\] of questions\[1\] begins with a blank \(' b'\), but target_delimiter=' '",
        ),
        (("x", ["a", "b"], 2), r"the position of the right choice, here 0 to 1; that of questions\[1\] is 2\."),
        (("x", ["a", "b"], -1), r"here 0 to 1; that of questions\[1\] is -1\."),
        (("x", ["a", "b"], "b"), r"here 0 to 1; that of questions\[1\] is 'b'\."),
        (("x", ["a", "b"], True), r"here 0 to 1; that of questions\[1\] is True\."),
    ],
)
def test_a_malformed_question_is_named_by_its_error(question: Any, sentence: str) -> None:
    with pytest.raises(ScoringError, match=sentence):
        multiple_choice()(canned({" a": -1.0, " b": -2.0}), [("x", ["a", "b"], 0), question])


def test_choices_without_tokens_are_named(tuned: Any) -> None:
    with pytest.raises(ScoringError, match="nothing to score"):
        multiple_choice(target_delimiter="")(tuned, [("the sun", ["rises", " "], 0)])


def test_the_error_of_an_unknown_metric_lists_the_metrics() -> None:
    with pytest.raises(ScoringError, match=r"^metric is one of acc, acc_norm, acc_bytes; found 'accuracy'\.$"):
        multiple_choice(cast(Any, "accuracy"))


# --- exact match ------------------------------------------------------------------------------------------------------


def says(text: str) -> Any:
    return SimpleNamespace(generate_many=lambda prompts, max_new_tokens: [text] * len(prompts))


@pytest.mark.parametrize(
    ("text", "answer", "options", "right"),
    [
        (" Paris", " Paris", {}, True),
        (" Paris", "Paris", {}, False),
        (" Paris\n\nQuestion:", " Paris", {}, True),
        (" Paris.\nQ", " Paris", {"until": [".", "\n"]}, True),
        (" Paris.\nQ", " Paris", {"until": ["\n"]}, False),
        (" Paris", " Paris", {"until": [""]}, True),
        (" paris", " Paris", {"ignore_case": True}, True),
        (" Paris!", " Paris", {"ignore_punctuation": True}, True),
        (" 1. Paris", " . Paris", {"ignore_numbers": True}, True),
        (" the Paris", " Paris", {"regexes_to_ignore": [r"\bthe "]}, True),
        (" The Paris", " Paris", {"regexes_to_ignore": [r"\bthe "], "ignore_case": True}, False),
        (" Paris", "Paris", {"regexes_to_ignore": [r"^\s+"]}, True),
    ],
)
def test_a_text_matches_exactly_except_for_ignored_parts(text: str, answer: str, options: Any, right: bool) -> None:
    assert exact_match(max_new_tokens=4, **options)(says(text), [("The capital is", answer)]) == [float(right)]


def test_the_text_is_the_greedy_one(tuned: Any) -> None:
    text = tuned.generate(PROMPTS[0], max_new_tokens=3)
    assert exact_match(max_new_tokens=3)(tuned, [(PROMPTS[0], text), (PROMPTS[1], "nothing like it")]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"until": "\n"}, r"expected a list of texts; found '\\n'"),
        ({"regexes_to_ignore": "the"}, "expected a list of regular expressions; found 'the'"),
        ({"regexes_to_ignore": ["(the"]}, r"regexes_to_ignore has '\(the', which is not a regular expression: "),
        ({"regexes_to_ignore": [5]}, "regexes_to_ignore has 5, which is not a regular expression"),
    ],
)
def test_invalid_settings_of_exact_match_are_refused(options: Any, sentence: str) -> None:
    with pytest.raises(ScoringError, match=sentence):
        exact_match(max_new_tokens=4, **options)


def test_questions_of_exact_match_are_pairs_and_its_length_is_checked(tuned: Any) -> None:
    with pytest.raises(ScoringError, match="expected a pair of a prompt and a completion; found 'the sun'"):
        exact_match(max_new_tokens=4)(tuned, ["the sun"])
    with pytest.raises(ScoringError, match="max_new_tokens must be at least 1, not 0"):
        exact_match(max_new_tokens=0)(tuned, [("the sun", " rises")])


# --- in a comparison --------------------------------------------------------------------------------------------------


def test_a_score_has_a_name_and_a_unit(base: Any) -> None:
    scores = [js_from(base), kl_from(base, top_k=5), multiple_choice("acc_norm"), exact_match(max_new_tokens=4)]
    named: list[Any] = [cast(Any, score).__name__ for score in scores]
    assert named == [
        "js_from(base)",
        "kl_from(base, top_k=5)",
        "multiple_choice('acc_norm', target_delimiter=' ')",
        "exact_match(max_new_tokens=4, until=['\\n\\n'], regexes_to_ignore=[])",
    ]
    asked = [("x", ["a", "b"], 0), ("y", ["a", "b"], 0)]
    assert [Questions(asked, score).unit for score in scores] == ["nats", "nats", "right answers", "right answers"]


@pytest.mark.parametrize("makes", [js_from, kl_from, multiple_choice, exact_match], ids=lambda makes: makes.__name__)
def test_what_makes_a_score_is_not_taken_for_one(makes: Any) -> None:
    with pytest.raises(
        ComparisonError, match=rf"^{makes.__name__} makes a score: call it, as in score={makes.__name__}"
    ):
        Questions(["a", "b"], makes)


def test_questions_with_one_prompt_are_one_cluster() -> None:
    asked = [("x", ["a", "b"], 0), ("x", ["c", "d"], 0), ["y", ("a", "b"), 1], (1, 2, 3), (1, 2, 4), ("x", "y", "z")]
    assert Questions(asked, multiple_choice()).clusters() == [[0, 1], [2], [3], [4], [5]]


def test_an_infinite_divergence_cannot_be_compared() -> None:
    whole = TokenDist(np.array([0, 1]), np.log(np.array([0.5, 0.5], np.float32)), 2)
    other = TokenDist(np.array([0]), np.array([0.0], np.float32), 0)
    view, reference = (
        cast(Any, SimpleNamespace(next_token_dist=lambda prompt, top_k, dist=dist: dist)) for dist in (whole, other)
    )
    with pytest.raises(
        ComparisonError, match=r"^the score of questions\[0\] \('a'\) is -inf for it; a comparison needs"
    ):
        Questions(["a", "b"], kl_from(reference)).scored_by(view, "it")
