"""The key is sent to the server only."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from werkzeug import Request, Response

from pytest_sway import ModelSpec
from pytest_sway.backends.api.builder import check_api
from pytest_sway.backends.api.connection import Key
from pytest_sway.errors import ServerError, SpecError, SwayError
from tests.unit.backends.api.conftest import Build
from tests.unit.backends.api.toy import Toy, reply

KEY = "k-abcdefgh12345678"


def _sent(toy: Toy) -> set[str | None]:
    return {headers.get("Authorization") for headers in toy.headers}


def test_without_a_variable_no_key_is_sent(build: Build, toy: Toy) -> None:
    build()
    assert _sent(toy) == {None}


def test_the_key_of_the_environment_is_sent(build: Build, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAY_API_KEY", f" {KEY}\n")
    build()
    assert _sent(toy) == {f"Bearer {KEY}"}


def test_a_spec_may_name_another_variable(build: Build, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWAY_API_KEY", "another one")
    monkeypatch.setenv("MY_SERVER", KEY)
    build(api_key_env="MY_SERVER")
    assert _sent(toy) == {f"Bearer {KEY}"}


def test_the_key_of_openai_goes_to_openai_alone(build: Build, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    build()
    assert _sent(toy) == {None}
    request = httpx.Request("GET", "https://api.openai.com/v1/models")
    next(Key().auth_flow(request))
    assert request.headers["Authorization"] == f"Bearer {KEY}"


def test_a_variable_that_is_named_and_not_set_is_an_error() -> None:
    sentence = (
        "the spec names 'MY_SERVER' as the variable of its server's key, but that environment variable is not set."
        " Set it, or omit 'api_key_env' if the server wants no key."
    )
    with pytest.raises(SpecError, match=f"^{re.escape(sentence)}$"):
        check_api(ModelSpec(kind="api", base="a", endpoint="http://nowhere.invalid", api_key_env="MY_SERVER"))


@pytest.mark.parametrize("value", [f"{KEY}\nX-Injected: yes", f"{KEY}é"])
def test_what_no_header_can_carry_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SWAY_API_KEY", value)
    sentence = (
        "^the environment variable 'SWAY_API_KEY' holds characters that a header cannot carry, such as a line break"
    )
    with pytest.raises(SpecError, match=sentence) as raised:
        check_api(ModelSpec(kind="api", base="a", endpoint="http://nowhere.invalid"))
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_is_not_quoted_though_the_server_does(build: Build, toy: Toy, status: int) -> None:
    toy.models_answer = reply({"error": {"message": f"Incorrect API key provided: {KEY[:4]}***{KEY[-4:]}"}}, status)
    sentence = (
        rf"^{toy.url}/v1/models answered {status} \w+: it wants a key, or another one\. Put it into the environment"
        r" variable SWAY_API_KEY, or into another one that the spec names as 'api_key_env'\.$"
    )
    with pytest.raises(ServerError, match=sentence):
        build()


def _repeating(status: int) -> Callable[[Request], Response]:
    """An answer that repeats the request."""
    return lambda request: Response(str(request.headers), status)


@pytest.mark.parametrize(
    "canned",
    [
        _repeating(400),
        _repeating(500),
        _repeating(200),
        lambda request: reply({"choices": [{"text": 7, "x": str(request.headers)}]}),
        lambda request: reply({"choices": str(request.headers)[-30:]}),
        lambda request: Response(iter([str(request.headers)]), 200, {"Content-Length": "9999"}),
        _repeating(307),
    ],
    ids=["400", "500", "no JSON", "no text", "no choices", "cut", "307"],
)
@pytest.mark.parametrize("name", ["SWAY_API_KEY", "MY_SERVER"])
def test_no_error_log_or_repr_shows_it(
    build: Build, toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, canned: Any, name: str
) -> None:
    monkeypatch.setenv(name, KEY)
    caplog.set_level(logging.DEBUG)
    backend = build(api_key_env=name)
    with backend.as_base() as view:
        toy.canned += [canned] * 5
        with pytest.raises(SwayError) as raised:
            view.generate("the", max_new_tokens=1)
        shown = [
            repr(view),
            repr(backend),
            repr(backend.spec),
            str(backend.spec),
            backend.cache_identity(),
            caplog.text,
        ]
    trace = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    assert f"Bearer {KEY}" in _sent(toy)
    for text in (*shown, str(raised.value), *_all_lines(trace)):
        assert KEY not in text


def _all_lines(trace: traceback.TracebackException) -> list[str]:
    """Return every line that a report can show of an error and its causes, with the variables of their frames.

    It leaves out the frames of this file, since the test itself holds the key.
    """
    trace.stack[:] = [frame for frame in trace.stack if frame.filename != __file__]
    return list(trace.format(chain=True))
