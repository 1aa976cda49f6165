"""Servers that fail: which requests are repeated, how often, and the messages of the errors."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from werkzeug import Request, Response

from pytest_sway.backends.api.connection import ATTEMPTS, RefusedError
from pytest_sway.errors import ServerError
from tests.unit.backends.api.conftest import Build
from tests.unit.backends.api.toy import Toy, reply

BACKOFF = [(0.5, 1.0), (1.0, 1.5), (2.0, 2.5), (4.0, 4.5)]
"""Bounds of the pauses in seconds: they double from 0.5, plus up to 0.5 so that clients don't retry in step."""


@pytest.fixture
def generate(build: Build) -> Callable[[], str]:
    backend = build()

    def ask() -> str:
        with backend.as_base() as view:
            return view.generate("the sun", max_new_tokens=1)

    return ask


@pytest.fixture
def never() -> Iterator[Callable[[Request], Response]]:
    """An answer that does not come before the test ends."""
    over = threading.Event()

    def wait(_request: Request) -> Response:
        over.wait(60)
        return reply({})

    yield wait
    over.set()


def _cut(_request: Request) -> Response:
    return Response(iter(['{"choices": [']), 200, {"Content-Length": "1000"})


# --- what may pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [reply({}, 500), reply({}, 502), reply({}, 503), reply({}, 429), _cut],
    ids=["500", "502", "503", "429", "cut"],
)
def test_what_may_pass_is_tried_again_after_longer_and_longer(
    toy: Toy, generate: Callable[[], str], sleeps: list[float], fault: Any
) -> None:
    expected = generate()
    toy.requests.clear()
    toy.canned += [fault, fault, fault]
    assert generate() == expected
    assert toy.requests[0] == toy.requests[3]
    assert len(toy.requests) == 4
    assert all(low <= slept <= high for slept, (low, high) in zip(sleeps, BACKOFF, strict=False))
    assert len(sleeps) == 3


def test_what_does_not_pass_is_given_up(toy: Toy, generate: Callable[[], str], sleeps: list[float]) -> None:
    toy.requests.clear()
    toy.canned += [reply({"error": {"message": "out of slots"}}, 503)] * ATTEMPTS
    sentence = rf"^{toy.url}/v1/completions answered 503 Service Unavailable: out of slots\. \(tried 5 times\)$"
    with pytest.raises(ServerError, match=sentence):
        generate()
    assert len(toy.requests) == ATTEMPTS
    assert all(low <= slept <= high for slept, (low, high) in zip(sleeps, BACKOFF, strict=True))


def test_an_answer_that_is_always_cut_off_is_reported_as_such(toy: Toy, generate: Callable[[], str]) -> None:
    toy.canned += [_cut] * ATTEMPTS
    sentence = rf"^{toy.url}/v1/completions broke off its answer \(RemoteProtocolError: .*\)\. \(tried 5 times\)$"
    with pytest.raises(ServerError, match=sentence):
        generate()


def test_a_server_says_how_long_to_wait(toy: Toy, generate: Callable[[], str], sleeps: list[float]) -> None:
    expected = generate()
    toy.canned += [reply({}, 429, **{"Retry-After": "7"}), reply({}, 503, **{"Retry-After": "0"})]
    assert generate() == expected
    assert sleeps[0] == 7.0
    assert sleeps[1] >= 1.0  # the pause after a second failure


def test_a_server_says_until_when_to_wait(toy: Toy, generate: Callable[[], str], sleeps: list[float]) -> None:
    expected = generate()
    soon, past = (format_datetime(datetime.now(UTC) + timedelta(seconds=s), usegmt=True) for s in (50, -50))
    toy.canned += [reply({}, 429, **{"Retry-After": soon}), reply({}, 429, **{"Retry-After": past})]
    assert generate() == expected
    assert 0 < sleeps[0] <= 50
    assert sleeps[1] >= 1.0


def test_a_time_to_wait_that_cannot_be_read_is_not_heeded(
    toy: Toy, generate: Callable[[], str], sleeps: list[float]
) -> None:
    expected = generate()
    toy.canned += [reply({}, 429, **{"Retry-After": "later"})]
    assert generate() == expected
    assert 0.5 <= sleeps[0] <= 1.0


def test_a_server_that_wants_to_be_left_alone_for_long_is_not_waited_for(
    toy: Toy, generate: Callable[[], str], sleeps: list[float]
) -> None:
    toy.canned += [reply({"error": {"message": "Quota exceeded."}}, 429, **{"Retry-After": "3600"})]
    sentence = (
        rf"^{toy.url}/v1/completions answered 429 Too Many Requests: Quota exceeded\. It asks for a pause of 3600"
        r" seconds, more than the 60 that a test waits\.$"
    )
    with pytest.raises(ServerError, match=sentence):
        generate()
    assert sleeps == []


def test_a_server_that_is_not_there_is_named(build: Build, sleeps: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    sentence = (
        rf"^{endpoint}/v1/models cannot be reached \(ConnectError: .*\)\. Is the server running, and is that its"
        r" address\? \(tried 5 times\)$"
    )
    with pytest.raises(ServerError, match=sentence):
        build(endpoint=endpoint)
    assert len(sleeps) == ATTEMPTS - 1


# --- what will not pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{"error": {"message": "The prompt is too long."}}', "The prompt is too long"),  # OpenAI, llama-cpp-python
        ('{"error": "stream must be of type bool"}', "stream must be of type bool"),  # mlx_lm
        ('{"object": "error", "message": "no such LoRA"}', "no such LoRA"),  # vLLM once
        ('{"detail": "Not Found"}', "Not Found"),  # FastAPI
        ("<h1>Bad\n  Request</h1>", "<h1>Bad Request</h1>"),
        ("", "without a text"),
        ("x" * 1000, "x" * 300),
        ("[]", r"\[\]"),
    ],
)
def test_a_refusal_is_raised_at_once_in_the_servers_words(
    toy: Toy, generate: Callable[[], str], sleeps: list[float], body: str, told: str
) -> None:
    toy.canned += [Response(body, 400)]
    sentence = rf"^{toy.url}/v1/completions answered 400 Bad Request: {told}\.$"
    with pytest.raises(RefusedError, match=sentence) as raised:
        generate()
    assert raised.value.status == 400
    assert sleeps == []


@pytest.mark.parametrize("status", [404, 413, 422, 499, 501])
def test_other_refusals_are_not_tried_again_either(
    toy: Toy, generate: Callable[[], str], sleeps: list[float], status: int
) -> None:
    toy.canned += [reply({"error": {"message": "no"}}, status)]
    with pytest.raises(RefusedError, match=rf"answered {status} .+: no\.$"):
        generate()
    assert sleeps == []


def test_a_redirect_is_not_followed(toy: Toy, generate: Callable[[], str]) -> None:
    toy.canned += [Response("", 307, {"Location": "http://elsewhere.invalid/"})]
    sentence = (
        rf"^{toy.url}/v1/completions answered 307 Temporary Redirect\. Redirects are not followed, since they could"
        r" take the key elsewhere\. Name the address that this one leads to as the endpoint\.$"
    )
    with pytest.raises(ServerError, match=sentence):
        generate()


def test_a_server_that_hangs_is_given_up_at_its_time(
    build: Build, toy: Toy, sleeps: list[float], never: Callable[[Request], Response]
) -> None:
    toy.models_answer = never
    sentence = (
        rf"^{toy.url}/v1/models gave no answer within 0\.2 seconds\. If the server is only slow, give the spec a longer"
        r" 'timeout'\.$"
    )
    with pytest.raises(ServerError, match=sentence):
        build(timeout=0.2)
    assert sleeps == []  # a repeated request would time out again
    toy.models_answer = None
    with build().as_base() as view:
        assert view.generate("the sun", max_new_tokens=1)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("", "''"),
        ("<html>Welcome</html>", "'<html>Welcome</html>'"),
        ('{"choices": [', r"'{\"choices\": \['"),
        ("\xff", "'\ufffd'"),
    ],
)
def test_what_is_no_json_is_shown(toy: Toy, generate: Callable[[], str], body: str, shown: str) -> None:
    toy.canned += [Response(body.encode("latin-1"), 200)]
    sentence = (
        rf"^{toy.url}/v1/completions answered with something that is not JSON: {shown}\. Is an OpenAI-compatible server"
        r" behind that address\?$"
    )
    with pytest.raises(ServerError, match=sentence):
        generate()


def _choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"text": " red", **fields}]}


def _lists(tokens: Any = (" red",), logprobs: Any = (-1.0,), tops: Any = ({" red": -1.0},)) -> dict[str, Any]:
    return _choice(logprobs={"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops})


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ([], r"the answer is \[\], not a dict"),
        (None, "the answer is None, not a dict"),
        ({}, "it has no 'choices'"),
        ({"choices": {}}, "'choices' is {}, not a list"),
        ({"choices": []}, "'choices' is empty"),
        ({"choices": ["x"]}, "the first of 'choices' is 'x', not a dict"),
        ({"choices": [{}]}, "it has no 'text'"),
        ({"choices": [{"text": 7}]}, "'text' is 7, not a str"),
        (_choice(logprobs=3), "'logprobs' is 3, not a dict"),
        (_choice(logprobs={"token_logprobs": []}), "it has no 'tokens'"),
        (_lists(tokens="x"), "'tokens' is 'x', not a list"),
        (_lists(tokens=[7]), "one of 'tokens' is 7, not a str"),
        (_lists(logprobs=["a"]), "one of 'token_logprobs' is 'a', not a number"),
        (_lists(logprobs=[True]), "one of 'token_logprobs' is True, not a number"),
        (_lists(logprobs=[0.7]), "one of 'token_logprobs' is 0.7, which is not the logarithm of a probability"),
        (_lists(logprobs=[]), "there are 1 'tokens', 0 'token_logprobs' and 1 'top_logprobs'"),
        (_lists(tops=[["x"]]), r"one of 'top_logprobs' is \['x'\], not a dict"),
        (_lists(tops=[{" red": None}]), "one of 'top_logprobs' is None, not a number"),
        (_choice(logprobs={"content": [7]}), "one of 'content' is 7, not a dict"),
        (_choice(logprobs={"content": [{}]}), "one of 'logprob' is None, not a number"),
        (_choice(logprobs={"content": [{"logprob": -1}]}), "it has no 'token'"),
        (_choice(logprobs={"content": ["y" * 99]}), r"one of 'content' is 'y{36}\.\.\., not a dict"),
    ],
    ids=str,
)
def test_what_is_no_completion_is_named(toy: Toy, build: Build, answer: Any, fault: str) -> None:
    backend = build()
    toy.canned += [reply(answer)]
    sentence = rf"^'base' on {toy.url} answered with something that is not a completion: {fault}\.$"
    with backend.as_base() as view, pytest.raises(ServerError, match=sentence):
        view.next_token_dist("the sun", top_k=2)
