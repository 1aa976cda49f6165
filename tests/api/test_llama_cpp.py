"""The api backend on a real server agrees with the hf backend on the same weights.

In float32 they agree to a thousandth of a nat. llama.cpp's 4-bit kernels also round the activations, so their results
differ by some hundredths of a nat for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pytest_sway.errors import ScoringError, ServerError, SpecError
from tests.api.conftest import BOS, KEY

TOLERANCE = 1e-3
QUANTISED_TOLERANCE = 0.3
"""Nats for one token between the 4-bit kernels and float32 on the same weights, dequantised."""

PROMPT = "The capital of France is"
PAIRS = [
    (PROMPT, " Paris"),
    ("Water boils at ", "one hundred degrees."),
    ("naïve 日本 is", " a word"),  # characters of several tokens each
]
SIDES = pytest.mark.parametrize("side", ["as_base", "as_finetuned"])


@SIDES
def test_completions_have_the_logprobs_of_the_hf_backend(served: Any, local: Any, side: str) -> None:
    with getattr(local, side)() as reference, getattr(served, side)() as view:
        expected = reference.logprobs_of([(BOS + prompt, completion) for prompt, completion in PAIRS])
        assert view.logprobs_of(PAIRS) == pytest.approx(expected, abs=TOLERANCE)


@SIDES
def test_texts_have_the_logprobs_of_the_hf_backend(served: Any, local: Any, side: str) -> None:
    text = PROMPT + " Paris."
    with getattr(local, side)() as reference, getattr(served, side)() as view:
        expected = reference.rolling_logprob(BOS + text, prefix=False)
        rolling = view.rolling_logprob(text, prefix=False)
    np.testing.assert_allclose(rolling.logprobs, expected.logprobs[1:], atol=TOLERANCE)  # the first has no score
    assert rolling.num_tokens == expected.num_tokens - 1


@SIDES
def test_the_next_tokens_are_those_of_the_hf_backend(served: Any, local: Any, side: str) -> None:
    with getattr(local, side)() as reference, getattr(served, side)() as view:
        expected, dist = reference.next_token_dist(BOS + PROMPT, top_k=10), view.next_token_dist(PROMPT, top_k=10)
    np.testing.assert_allclose(dist.logprobs, expected.logprobs, atol=TOLERANCE)
    assert dist.tail_logprob == pytest.approx(expected.tail_logprob, abs=TOLERANCE)


@SIDES
def test_greedy_generation_is_that_of_the_hf_backend(served: Any, local: Any, side: str) -> None:
    with getattr(local, side)() as reference, getattr(served, side)() as view:
        assert view.generate(PROMPT, max_new_tokens=8) == reference.generate(BOS + PROMPT, max_new_tokens=8)


def test_the_two_sides_differ_as_they_do_under_the_hf_backend(served: Any, local: Any) -> None:
    differences = []
    for backend, prompt in ((served, PROMPT), (local, BOS + PROMPT)):
        with backend.as_base() as base, backend.as_finetuned() as tuned:
            differences.append(tuned.logprob_of(prompt, " Paris") - base.logprob_of(prompt, " Paris"))
    assert abs(differences[0]) > 0.1
    assert differences[0] == pytest.approx(differences[1], abs=TOLERANCE)


def test_four_bit_weights_are_near_what_they_stand_for(build: Callable[..., Any], endpoint: str, local: Any) -> None:
    quantised = build(kind="api", base="quantised", endpoint=endpoint)
    with quantised.as_base() as view, local.as_base() as reference:
        dist, expected = view.next_token_dist(PROMPT, top_k=3), reference.next_token_dist(PROMPT, top_k=3)
    np.testing.assert_allclose(dist.logprobs, expected.logprobs, atol=QUANTISED_TOLERANCE)


def test_a_wrong_echo_is_found_out(build: Callable[..., Any], endpoint: str) -> None:
    sentence = (
        f"^'quantised' on {endpoint} echoes wrong log-probabilities: .* off by one token for models that put no BOS"
    )
    with build(kind="api", base="quantised", endpoint=endpoint).as_base() as view:
        with pytest.raises(ScoringError, match=sentence):
            view.logprob_of(PROMPT, " Paris")
        assert view.generate(PROMPT, max_new_tokens=1)


def test_both_sides_pass_the_preflight(served: Any) -> None:
    assert served.preflight_finite_check() == (True, "")


def test_special_tokens_that_the_server_leaves_out_are_missed(served: Any) -> None:
    with served.as_base() as view, pytest.raises(ScoringError, match="with tokens that do not make up the text"):
        view.logprob_of(PROMPT, f" Paris{BOS}")


def test_a_text_that_is_too_long_is_refused_in_the_servers_words(served: Any) -> None:
    sentence = r"answered 400 Bad Request: This model's maximum context length is 256 tokens, however you requested"
    with served.as_base() as view, pytest.raises(ServerError, match=sentence):
        view.logprob_of("word " * 300, "word")


def test_a_model_that_is_not_served_is_refused(build: Callable[..., Any], endpoint: str) -> None:
    with pytest.raises(SpecError, match=r"has no model 'v3'; it serves 'base', 'quantised', 'tuned'\."):
        build(kind="api", base="base", finetuned="v3", endpoint=endpoint)


def test_without_its_key_the_server_refuses(
    build: Callable[..., Any], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG_KEY", "not the key")
    with pytest.raises(ServerError, match="answered 401 Unauthorized: it wants a key, or another one") as raised:
        build(kind="api", base="base", endpoint=endpoint, api_key_env="WRONG_KEY")
    assert KEY not in str(raised.value)
    assert "not the key" not in str(raised.value)


def test_a_suite_gets_it_from_the_fixture(pytester: pytest.Pytester, endpoint: str) -> None:
    spec = {"kind": "api", "base": "base", "finetuned": "tuned", "endpoint": f"{endpoint}/v1"}
    pytester.makepyfile(f"""
SPEC = {spec!r}


def test_the_adapter_changed_it(sway_backend):
    backend = sway_backend(SPEC)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert abs(tuned.logprob_of({PROMPT!r}, " Paris") - base.logprob_of({PROMPT!r}, " Paris")) > 0.1

""")
    result = pytester.runpytest_subprocess("-p", "no:randomly", timeout=120)
    result.assert_outcomes(passed=1)
    assert KEY not in result.stdout.str() + result.stderr.str()
