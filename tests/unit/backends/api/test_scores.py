"""Scores of toy models with known numbers, on servers of each kind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pytest_sway.errors import BackendUseError, ScoringError
from pytest_sway.protocols import BatchView, TokenDist, View
from tests.unit.backends.api.conftest import Build
from tests.unit.backends.api.toy import VOCABULARY, Toy, distribution, number, reply, text_nats, tokenize

PROMPT, ANSWER = "the sun rises in the", " east and west"
ECHOING = pytest.mark.parametrize("toy", ["openai", "vllm"], indirect=True)


def _bos(toy: Toy) -> bool:
    return toy.style == "vllm"


@ECHOING
def test_each_side_is_its_model(build: Build, toy: Toy) -> None:
    backend = build()
    tokens = tokenize(PROMPT + ANSWER)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        for view, name in ((base, "base"), (tuned, "tuned")):
            assert view.logprob_of(PROMPT, ANSWER) == pytest.approx(text_nats(name, tokens, 3, bos=_bos(toy)))
            assert isinstance(view, View)


@ECHOING
@pytest.mark.parametrize(
    ("prompt", "completion", "scored"),
    [
        ("the sun ", "rises", [" rises"]),
        ("the sun \n", " rises", [" ", "\n", " rises"]),
        ("the sun", " ", [" "]),
        ("the un", "happy day", [" day"]),  # " unhappy" replaces the prompt's last token
        ("the happ", "y day now one two three", [" three"]),  # the prompt alone is "the", " ", "h", "a", "p", "p"
        ("the sunrise", " is red", [" is", " red"]),
        ("日本 is", " red", [" red"]),  # characters without a spelling
        ("is 日", "本", ["\ufffd", "\ufffd"]),
    ],
)
def test_prompt_and_completion_are_split_as_in_lm_evaluation_harness(
    build: Build, toy: Toy, prompt: str, completion: str, scored: list[str]
) -> None:
    tokens = tokenize(prompt + completion)
    assert tokens[len(tokenize(prompt.rstrip())) :] == scored  # as the harness's TemplateLM._encode_pair
    with build().as_base() as view:
        expected = text_nats("base", tokens, len(scored), bos=_bos(toy))
        assert view.logprob_of(prompt, completion) == pytest.approx(expected)


@pytest.mark.parametrize(("prompt", "completion"), [("the sun", ""), ("the un", "happy"), ("", "")])
def test_a_completion_of_no_tokens_has_no_logprob(build: Build, prompt: str, completion: str) -> None:
    sentence = f"^the completion '{completion}' has no tokens after the prompt '{prompt}'; there is nothing to score.$"
    with build().as_base() as view, pytest.raises(ScoringError, match=sentence):
        view.logprob_of(prompt, completion)


@pytest.mark.parametrize("toy", ["vllm"], indirect=True)
def test_an_empty_prompt_is_stood_for_by_the_bos_of_the_server(build: Build) -> None:
    with build().as_base() as view:
        assert view.logprob_of("", "the sun") == pytest.approx(text_nats("base", ["the", " sun"], 2, bos=True))


def test_after_an_empty_prompt_a_server_without_bos_scores_nothing(build: Build, toy: Toy) -> None:
    sentence = (
        f"^'base' on {toy.url} gives no log-probability for the first token of a text, since nothing comes before"
    )
    with build().as_base() as view, pytest.raises(ScoringError, match=sentence):
        view.logprob_of("", "the sun")


def test_the_tokens_of_a_text_are_scored_one_by_one(build: Build) -> None:
    tokens = tokenize(PROMPT + ANSWER)
    with build().as_base() as view:
        rolling = view.rolling_logprob(PROMPT + ANSWER, prefix=False)
    expected = [text_nats("base", tokens[: i + 1], 1) for i in range(1, len(tokens))]
    np.testing.assert_allclose(rolling.logprobs, expected, rtol=1e-6)
    assert rolling.total_logprob == pytest.approx(math.fsum(expected))
    assert rolling.num_tokens == len(rolling.token_ids) == len(tokens)
    assert rolling.token_ids.dtype == np.int64
    assert rolling.logprobs.dtype == np.float32


@pytest.mark.parametrize("toy", ["vllm"], indirect=True)
@pytest.mark.parametrize("prefix", [False, True])
def test_a_bos_that_the_server_shows_is_the_first_token_of_a_text(build: Build, prefix: bool) -> None:
    tokens = tokenize(PROMPT)
    with build().as_base() as view:
        rolling = view.rolling_logprob(PROMPT, prefix=prefix)
    assert rolling.total_logprob == pytest.approx(text_nats("base", tokens, len(tokens), bos=True))
    assert rolling.num_tokens == len(tokens) + 1
    assert rolling.token_ids[1:].tolist() == [number(token) for token in tokens]


@pytest.mark.parametrize("toy", ["vllm"], indirect=True)
def test_every_token_of_a_text_is_scored_by_default(build: Build) -> None:
    with build().as_base() as view:
        one, (many,) = view.rolling_logprob(PROMPT), view.rolling_logprobs([PROMPT])
    assert (
        one.total_logprob
        == many.total_logprob
        == pytest.approx(text_nats("base", tokenize(PROMPT), len(tokenize(PROMPT)), bos=True))
    )


def test_a_server_that_cannot_score_the_first_token_says_so_and_what_to_pass(build: Build, toy: Toy) -> None:
    sentence = (
        rf"^rolling_logprob scores every token of a text by default, but 'base' on {toy.url} shows no BOS"
        r" .* Pass prefix=False to score the tokens after it"
    )
    with build().as_base() as view:
        for score in (view.rolling_logprob, lambda text: view.rolling_logprobs([text])):
            with pytest.raises(ScoringError, match=sentence):
                score(PROMPT)


def test_a_text_of_nothing_needs_no_request(build: Build, toy: Toy) -> None:
    backend = build()
    asked = len(toy.requests)
    with backend.as_base() as view:
        rolling = view.rolling_logprob("")
    assert (rolling.num_tokens, rolling.logprobs.size, rolling.total_logprob) == (0, 0, 0.0)
    assert len(toy.requests) == asked


def test_a_token_has_the_same_number_in_every_answer(build: Build) -> None:
    backend = build()
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        ours = base.rolling_logprob("the sun is the sun", prefix=False)
        theirs = tuned.rolling_logprob("the sun is red", prefix=False)
        nexts = base.next_token_dist("the", top_k=5).token_ids
    assert ours.token_ids[1] == ours.token_ids[4] == theirs.token_ids[1]  # " sun"
    assert ours.token_ids[0] != ours.token_ids[3]  # "the", " the"
    assert (ours.token_ids < 0).all()  # no vocabulary has negative ids
    assert (nexts < 0).all()


@pytest.mark.parametrize("toy", ["vllm", "llama-server", "mlx"], indirect=True)
def test_token_ids_from_a_server_are_used(build: Build, toy: Toy) -> None:
    after = distribution("tuned", [*(["<s>"] if _bos(toy) else []), *tokenize(PROMPT)])
    with build().as_finetuned() as view:
        dist = view.next_token_dist(PROMPT, top_k=3)
    assert [VOCABULARY[token] for token in dist.token_ids] == sorted(after, key=lambda token: -after[token])[:3]
    np.testing.assert_allclose(dist.logprobs, sorted(after.values(), reverse=True)[:3], rtol=1e-6)


@pytest.mark.parametrize("toy", ["openai", "vllm"], indirect=True)
def test_numbers_of_ours_serve_the_divergence_of_dlm_sway_as_ids_do(build: Build, toy: Toy) -> None:
    divergences = pytest.importorskip("dlm_sway.probes._divergence", reason="dlm-sway is not installed")
    backend = build()
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        found = divergences.divergence(base.next_token_dist(PROMPT, top_k=5), tuned.next_token_dist(PROMPT, top_k=5))
    sides = []
    for name in ("base", "tuned"):
        after = distribution(name, [*(["<s>"] if _bos(toy) else []), *tokenize(PROMPT)])
        top = sorted(after, key=lambda token: -after[token])[:5]
        logprobs = np.array([after[token] for token in top], np.float32)
        sides.append(TokenDist(np.array([number(token) for token in top]), logprobs, len(VOCABULARY)))
    assert found == pytest.approx(divergences.divergence(*sides), abs=1e-6)


@pytest.mark.parametrize(
    ("toy", "given"), [("openai", 5), ("vllm", 20), ("mlx", 10), ("llama-server", len(VOCABULARY))], indirect=["toy"]
)
def test_of_more_tokens_than_the_server_gives_it_is_what_the_server_gives(build: Build, toy: Toy, given: int) -> None:
    backend = build()
    with backend.as_base() as view:
        dist = view.next_token_dist(PROMPT)
        asked = len(toy.requests)
        again = view.next_token_dist(PROMPT)
    assert dist.logprobs.size == given
    assert len(toy.requests) == asked + 1  # its limit is already known
    np.testing.assert_array_equal(dist.token_ids, again.token_ids)


@pytest.mark.parametrize("toy", ["vllm"], indirect=True)
def test_a_limit_that_the_server_names_is_asked_for(build: Build, toy: Toy) -> None:
    toy.limit = 23  # as vLLM with --max-logprobs
    with build().as_base() as view:
        assert view.next_token_dist(PROMPT).logprobs.size == 23


def test_what_the_given_tokens_leave_is_the_tail(build: Build) -> None:
    with build().as_base() as view:
        dist = view.next_token_dist(PROMPT, top_k=3)
    assert dist.tail_logprob is not None
    assert math.exp(dist.tail_logprob) == pytest.approx(1 - float(np.exp(dist.logprobs).sum()), abs=1e-6)
    assert np.all(np.diff(dist.logprobs) <= 0)
    assert dist.vocab_size == 0  # this server does not report it


@pytest.mark.parametrize("toy", ["llama-server"], indirect=True)
def test_a_whole_vocabulary_has_no_tail(build: Build) -> None:
    with build().as_base() as view:
        dist = view.next_token_dist(PROMPT, top_k=1000)
    assert dist.vocab_size == dist.logprobs.size == len(VOCABULARY)
    assert dist.tail_logprob is None


@pytest.mark.parametrize("toy", ["openai", "llama-server", "mlx"], indirect=True)
def test_its_texts_are_the_servers_spelling(build: Build) -> None:
    with build().as_base() as view:
        dist = view.next_token_dist(PROMPT, top_k=3)
    after = distribution("base", tokenize(PROMPT))
    assert dist.texts == sorted(after, key=lambda token: -after[token])[:3]


@pytest.mark.parametrize("toy", ["vllm"], indirect=True)
def test_it_has_no_texts_where_the_server_gives_ids_alone(build: Build) -> None:
    with build().as_base() as view:
        dist = view.next_token_dist(PROMPT, top_k=3)
    with pytest.raises(BackendUseError, match="or its server, gives token ids alone"):
        _ = dist.texts


def test_top_k_starts_at_one(build: Build) -> None:
    with build().as_base() as view, pytest.raises(ScoringError, match=r"^top_k must be at least 1, not 0\.$"):
        view.next_token_dist(PROMPT, top_k=0)


def test_generation_passes_its_settings_on(build: Build, toy: Toy) -> None:
    with build().as_finetuned() as view:
        text = view.generate(PROMPT, max_new_tokens=1, temperature=0.5, top_p=0.9, seed=7)
    after = distribution("tuned", tokenize(PROMPT))
    assert text == max(after, key=lambda token: after[token])
    sent = {"model": "tuned", "prompt": PROMPT, "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    assert toy.requests[-1] == {**sent, "repeat_penalty": 1.0, "repetition_penalty": 1.0, "min_p": 0.0}


def test_a_server_that_knows_openais_settings_alone_gets_no_others(build: Build, toy: Toy) -> None:
    toy.canned += [reply({"error": {"message": "Unrecognized request argument supplied: repeat_penalty"}}, 400)]
    with build().as_base() as view:
        view.generate(PROMPT, max_new_tokens=1)
    settings = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
    assert toy.requests[0].keys() > toy.requests[1].keys()
    assert toy.requests[-1].keys() == settings


def test_many_at_once_come_in_their_order(build: Build, toy: Toy) -> None:
    pairs = [(PROMPT, f" {word}") for word in ("one", "two", "three", "day", "now", "red", "east", "west")]
    texts = [prompt + completion for prompt, completion in pairs]
    with build().as_base() as view:
        assert view.logprobs_of(pairs) == [view.logprob_of(*pair) for pair in pairs]
        totals = [rolling.total_logprob for rolling in view.rolling_logprobs(texts, prefix=False)]
        assert totals == [view.rolling_logprob(text, prefix=False).total_logprob for text in texts]
        dists = view.next_token_dists(texts, top_k=2)
        assert [dist.logprobs.tolist() for dist in dists] == [
            view.next_token_dist(text, top_k=2).logprobs.tolist() for text in texts
        ]
        assert view.generate_many(texts, max_new_tokens=2) == [view.generate(text, max_new_tokens=2) for text in texts]
        assert view.logprobs_of([]) == []


def test_each_prompt_may_have_a_seed_of_its_own(build: Build, toy: Toy) -> None:
    with build().as_base() as view:
        view.generate_many(["one", "two"], max_new_tokens=1, temperature=1.0, seed=[3, 4])
    assert {(body["prompt"], body["seed"]) for body in toy.requests[-2:]} == {("one", 3), ("two", 4)}


def test_pairs_may_come_from_a_generator(build: Build) -> None:
    with build().as_base() as view:
        assert len(view.logprobs_of((PROMPT, word) for word in (" one", " two"))) == 2


def test_a_prompt_of_messages_is_refused(build: Build, toy: Toy) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    sentence = (
        f"^a prompt of messages was given to 'base' on {toy.url}, whose chat template is unknown here. Render it as"
        " text"
    )
    with build().as_base() as view:
        assert isinstance(view, BatchView)
        uses: list[Any] = [
            lambda: view.render(messages),
            lambda: view.logprob_of(messages, "Hi"),
            lambda: view.next_token_dist(messages),
            lambda: view.generate(messages, max_new_tokens=1),
        ]
        for use in uses:
            with pytest.raises(ScoringError, match=sentence):
                use()


# --- what a server cannot do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ["llama-server", "mlx"], indirect=True)
def test_a_server_that_does_not_echo_scores_no_texts_and_says_so(build: Build, toy: Toy) -> None:
    sentence = (
        f"^'base' on {toy.url} does not echo a text with its log-probabilities, which logprob_of and rolling_logprob"
    )
    with build().as_base() as view:
        for score in (lambda: view.logprob_of(PROMPT, ANSWER), lambda: view.rolling_logprob(PROMPT)):
            with pytest.raises(ScoringError, match=sentence):
                score()
        asked = len(toy.requests)
        with pytest.raises(ScoringError, match=sentence):
            view.logprob_of(PROMPT, ANSWER)
        assert len(toy.requests) == asked  # a known limit is not asked again
        assert view.generate(PROMPT, max_new_tokens=2)
        assert view.next_token_dist(PROMPT, top_k=2).logprobs.size == 2


@pytest.mark.parametrize("toy", ["shifted"], indirect=True)
def test_an_echo_that_is_off_by_one_token_is_found_out(build: Build, toy: Toy) -> None:
    sentence = (
        rf"^'base' on {toy.url} echoes wrong log-probabilities: -\d+\.\d\d for .* which it generates with -\d\.\d\d\."
        r" llama-cpp-python is off by one token"
    )
    with build().as_base() as view, pytest.raises(ScoringError, match=sentence):
        view.logprob_of(PROMPT, ANSWER)


@pytest.mark.parametrize("toy", ["silent"], indirect=True)
def test_a_server_without_logprobs_generates_and_says_why_it_does_not_score(build: Build, toy: Toy) -> None:
    sentence = f"^'base' on {toy.url} gives no log-probabilities: the request asked for . of each token"
    with build().as_base() as view:
        asked: list[Any] = [
            lambda: view.logprob_of(PROMPT, ANSWER),
            lambda: view.rolling_logprob(PROMPT),
            lambda: view.next_token_dist(PROMPT, top_k=2),
        ]
        for score in asked:
            with pytest.raises(ScoringError, match=sentence):
                score()
        assert view.generate(PROMPT, max_new_tokens=2)


def test_settings_that_a_server_has_are_passed_on(build: Build, toy: Toy) -> None:
    with build().as_base() as view:
        view.generate(PROMPT, max_new_tokens=2, temperature=1.0, top_k=3, min_p=0.1, repetition_penalty=1.5, stop=["x"])
        sent = toy.requests[-1]
        assert (sent["top_k"], sent["min_p"], sent["repetition_penalty"], sent["stop"]) == (3, 0.1, 1.5, ["x"])
        assert (sent["repeat_penalty"], sent["repeat_last_n"]) == (1.5, -1)  # llama.cpp's names
        before = len(toy.requests)
        view.generate_many([PROMPT, "the sun"], max_new_tokens=2, temperature=1.0, top_k=2)
        assert len(toy.requests) == before + 2  # the server was tried once


@pytest.mark.parametrize(
    ("setting", "how"),
    [
        ({"top_k": 3}, r"top_k=1, temperature=2\.0"),
        ({"min_p": 0.2}, r"min_p=1\.0, temperature=2\.0"),
        ({"repetition_penalty": 1.1}, r"repetition_penalty=2\.0"),
    ],
)
def test_a_server_that_ignores_a_setting_is_found_out(
    build: Build, toy: Toy, setting: dict[str, Any], how: str
) -> None:
    (name,) = setting
    toy.heeds.remove(name)
    with build().as_base() as view:
        with pytest.raises(ScoringError, match=rf"^'base' on .* ignores {name}: with {how} it continues '1, 2, "):
            view.generate(PROMPT, max_new_tokens=1, temperature=1.0, **setting)
        assert view.generate(PROMPT, max_new_tokens=1, temperature=1.0)


def test_a_server_that_refuses_a_setting_says_which(build: Build, toy: Toy) -> None:
    greedy = toy.answer({"model": "base", "prompt": PROMPT, "max_tokens": 1, "temperature": 0.0})
    refusal = reply({"error": {"message": "Unrecognized request argument supplied: top_k"}}, 400)
    with build().as_base() as view:
        toy.canned += [reply(greedy), refusal]
        with pytest.raises(ScoringError, match=r"^'base' on .* refuses top_k: .*supplied: top_k"):
            view.generate(PROMPT, max_new_tokens=1, temperature=1.0, top_k=3)


def test_settings_of_sampling_are_not_sent_where_nothing_is_sampled(build: Build, toy: Toy) -> None:
    with build().as_base() as view:
        before = len(toy.requests)
        view.generate(PROMPT, max_new_tokens=1, top_k=3, min_p=0.5)
    assert len(toy.requests) == before + 1
    assert "top_k" not in toy.requests[-1]


@pytest.mark.parametrize("heeded", [True, False])
def test_a_text_ends_before_a_stop_text_whether_or_not_the_server_knows_it(
    build: Build, toy: Toy, heeded: bool
) -> None:
    if not heeded:
        toy.heeds.remove("stop")
    with build().as_base() as view:
        whole = view.generate(PROMPT, max_new_tokens=6)
        middle = whole[len(whole) // 2 :]
        assert view.generate(PROMPT, max_new_tokens=6, stop=middle) == whole[: whole.index(middle)]
