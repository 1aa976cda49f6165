"""Many questions at once get the same answers as one by one, in the same order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_sway.errors import ScoringError
from pytest_sway.protocols import BatchView
from tests.tiny import TEXT, WORDS, make_adapter
from tests.unit.backends.hf.insides import computing_model, passes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TEXTS = [" ".join(WORDS[i : i + n]) for i, n in enumerate([3, 40, 1, 17, 5, 40, 2, 29, 60, 11])]
PAIRS = [(TEXTS[i], " " + TEXTS[-1 - i]) for i in range(len(TEXTS))]
CHOICES = [(TEXTS[8], f" {word} {WORDS[n]}"[: None if n else len(word) + 1]) for n, word in enumerate(WORDS[:5])]

TOLERANCE = 2e-4


@pytest.fixture(params=["base", "ft"])
def view(request: pytest.FixtureRequest, build: Any, base: Path, adapter: Path) -> Iterator[Any]:
    backend = build(base, adapter)
    with backend.as_base() if request.param == "base" else backend.as_finetuned() as view:
        yield view


@pytest.fixture
def passes(view: Any) -> list[tuple[int, int]]:
    """The shapes of the inputs of the model's passes, in order."""
    view.next_token_dists([TEXT, "paris"])  # runs the one-time trials first
    return passes_of(view)


def test_a_view_satisfies_the_protocol(view: Any) -> None:
    assert isinstance(view, BatchView)


def test_logprobs_of_pairs_are_those_of_each_alone(view: Any) -> None:
    alone = [view.logprob_of(*pair) for pair in PAIRS]
    assert view.logprobs_of(PAIRS) == pytest.approx(alone, abs=TOLERANCE)


def test_completions_of_one_prompt_share_its_pass_and_have_the_same_logprobs(
    view: Any, passes: list[tuple[int, int]]
) -> None:
    alone = [view.logprob_of(*pair) for pair in CHOICES]
    passes.clear()
    together = view.logprobs_of(CHOICES)
    assert together == pytest.approx(alone, abs=TOLERANCE)
    read = [rows * length for rows, length in passes if length >= 60]
    assert len(read) == 1, "the prompt was read once"


def test_completions_of_many_prompts_go_through_the_model_together_each_prompt_once(
    view: Any, passes: list[tuple[int, int]]
) -> None:
    endings = ["", " and", f" {WORDS[3]} {WORDS[4]}", f" {' '.join(WORDS[:9])}"]
    prompts = [TEXTS[8], TEXTS[1], TEXTS[7], TEXTS[0], TEXTS[2]]
    pairs = [(prompt, f" {WORDS[n]}{ending}") for prompt in prompts for n, ending in enumerate(endings)]
    pairs = pairs[::2] + pairs[1::2]
    alone = [view.logprob_of(*pair) for pair in pairs]
    passes.clear()
    assert view.logprobs_of(pairs) == pytest.approx(alone, abs=TOLERANCE)
    assert len(passes) == 1
    read = passes[0][0] * passes[0][1]
    each_alone = sum(len(view.tokenizer(prompt + ending)["input_ids"]) for prompt, ending in pairs)
    assert read < each_alone / 2


def test_very_many_completions_of_one_prompt_have_the_logprobs_of_each_alone(
    view: Any, passes: list[tuple[int, int]]
) -> None:
    pairs = [(TEXTS[8], f" {WORDS[n % 20]} {' '.join(WORDS[n // 20 : n // 20 + n % 7])}") for n in range(300)]
    alone = [view.logprob_of(*pair) for pair in pairs[::10]]
    passes.clear()
    assert view.logprobs_of(pairs)[::10] == pytest.approx(alone, abs=TOLERANCE)
    each_alone = sum(len(view.tokenizer(prompt + ending)["input_ids"]) for prompt, ending in pairs)
    assert _read(passes) < each_alone / 5


def _read(passes: list[tuple[int, int]]) -> int:
    return sum(rows * length for rows, length in passes)


def test_prompts_that_begin_alike_have_that_read_once(view: Any, passes: list[tuple[int, int]]) -> None:
    prompts = [f"{TEXTS[8]} {text}" for text in TEXTS[:5]]
    alone = [view.next_token_dist(prompt, top_k=20) for prompt in prompts]
    each_alone = _read(passes)
    passes.clear()
    for dist, expected in zip(view.next_token_dists(prompts, top_k=20), alone, strict=True):
        np.testing.assert_allclose(dist.logprobs, expected.logprobs, atol=TOLERANCE)
    assert _read(passes) <= each_alone - 4 * 60


def test_completions_of_prompts_that_begin_alike_have_beginnings_and_prompts_read_once(
    view: Any, passes: list[tuple[int, int]]
) -> None:
    prompts = [f"{TEXTS[8]} {text}" for text in (TEXTS[3], TEXTS[7], TEXTS[9])]
    pairs = [(prompt, f" {WORDS[n]} {WORDS[0]}") for n in range(4) for prompt in prompts]
    alone = [view.logprob_of(*pair) for pair in pairs]
    passes.clear()
    assert view.logprobs_of(pairs) == pytest.approx(alone, abs=TOLERANCE)
    assert _read(passes) == 60 + 17 + 29 + 11 + len(pairs)


def test_texts_that_begin_alike_have_that_read_once(view: Any, passes: list[tuple[int, int]]) -> None:
    scored = [f"{TEXTS[8]} {text}" for text in TEXTS[:5]]
    alone = [view.rolling_logprob(text) for text in scored]
    each_alone = _read(passes)
    passes.clear()
    for rolling, expected in zip(view.rolling_logprobs(scored), alone, strict=True):
        np.testing.assert_allclose(rolling.logprobs, expected.logprobs, atol=TOLERANCE)
    assert _read(passes) <= each_alone - 4 * 60


def test_what_texts_begin_with_in_common_has_its_logits_computed_once(view: Any, passes: list[tuple[int, int]]) -> None:
    scored = [f"{TEXTS[8]} {word}" for word in WORDS[:4]]  # the model's inputs are all TEXTS[8]
    alone = [view.rolling_logprob(text) for text in scored]
    heads: list[int] = []
    head = computing_model(view).get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: heads.append(args[0].shape[1]))
    passes.clear()
    together = view.rolling_logprobs(scored)
    for rolling, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(rolling.logprobs, expected.logprobs, atol=TOLERANCE)
    assert sum(heads) == _read(passes) == len(together[0].logprobs)


@pytest.mark.parametrize("prefix", [True, False])
def test_rolling_logprobs_are_those_of_each_alone(view: Any, prefix: bool) -> None:
    together = view.rolling_logprobs(TEXTS, prefix=prefix)
    for text, rolling in zip(TEXTS, together, strict=True):
        alone = view.rolling_logprob(text, prefix=prefix)
        np.testing.assert_array_equal(rolling.token_ids, alone.token_ids)
        np.testing.assert_allclose(rolling.logprobs, alone.logprobs, atol=TOLERANCE)
        assert rolling.total_logprob == pytest.approx(float(rolling.logprobs.sum()), abs=1e-5)


def test_next_token_dists_are_those_of_each_alone(view: Any) -> None:
    for text, dist in zip(TEXTS, view.next_token_dists(TEXTS, top_k=20), strict=True):
        alone = view.next_token_dist(text, top_k=20)
        np.testing.assert_allclose(dist.logprobs, alone.logprobs, atol=TOLERANCE)
        assert dist.tail_logprob == pytest.approx(alone.tail_logprob, abs=1e-4)
        assert (dist.token_ids.dtype, dist.logprobs.dtype) == (np.int64, np.float32)


def test_the_same_questions_get_the_same_bits(view: Any) -> None:
    assert view.logprobs_of(PAIRS + CHOICES) == view.logprobs_of(PAIRS + CHOICES)
    for a, b in zip(view.rolling_logprobs(TEXTS), view.rolling_logprobs(TEXTS), strict=True):
        assert a.logprobs.tobytes() == b.logprobs.tobytes()


def test_short_texts_go_through_the_model_together_without_padding_and_equal_ones_once(
    view: Any, passes: list[tuple[int, int]]
) -> None:
    view.rolling_logprobs([TEXTS[0], TEXTS[2], TEXTS[4], TEXTS[0]])
    assert passes == [(1, 3 + 1 + 5)]


def test_any_iterable_will_do_and_nothing_gives_nothing(view: Any) -> None:
    assert view.logprobs_of(iter(PAIRS[:2])) == view.logprobs_of(tuple(PAIRS[:2]))
    assert view.logprobs_of([]) == view.rolling_logprobs(()) == view.next_token_dists([]) == []
    assert view.generate_many([], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (
            lambda view: view.logprobs_of("ab"),
            "expected a list of pairs of a prompt and a completion; found 'ab'",
        ),
        (lambda view: view.logprobs_of(["ab"]), "expected a pair of a prompt and a completion; found 'ab'"),
        (lambda view: view.logprobs_of([("a", "b", "c")]), r"expected a pair .*; found \('a', 'b', 'c'\)"),
        (lambda view: view.rolling_logprobs(TEXT), "expected a list of texts; found 'the sun .*"),
        (lambda view: view.rolling_logprobs([1]), "expected a text to score; found 1"),
        (lambda view: view.next_token_dists(None), "expected a list of prompts; found None"),
        (lambda view: view.next_token_dists([3]), "expected a prompt: a text, or a list of messages .*; found 3"),
        (lambda view: view.generate_many("a", max_new_tokens=1), "expected a list of prompts"),
    ],
)
def test_what_is_no_list_of_questions_is_refused(view: Any, use: Callable[[Any], object], text: str) -> None:
    with pytest.raises(ScoringError, match=text):
        use(view)


@pytest.mark.parametrize("invocation", [["the"], ["sun", "the", "the"], ["in", "the"]])
def test_padding_invokes_no_alora_adapter(build: Any, base: Path, tmp_path: Path, invocation: list[str]) -> None:
    ids = [4 + WORDS.index(word) for word in invocation]
    adapter = make_adapter(tmp_path, base, alora_invocation_tokens=ids)
    texts = [" ".join([*WORDS[40 : 40 + n], *ends, "the"]) for n, ends in ((3, ["in"]), (30, ["in"]), (9, ["sun"]))]
    with build(base, adapter).as_finetuned() as view:
        passes = passes_of(view)
        together = view.next_token_dists(texts)
        in_one_pass = len(passes) == 1
        for text, dist in zip(texts, together, strict=True):
            alone = view.next_token_dist(text)
            np.testing.assert_array_equal(dist.token_ids[:3], alone.token_ids[:3])
            np.testing.assert_allclose(dist.logprobs, alone.logprobs, atol=TOLERANCE)
        assert view.generate_many(texts, max_new_tokens=6) == [view.generate(t, max_new_tokens=6) for t in texts]
        assert in_one_pass is (invocation == ["in", "the"])
