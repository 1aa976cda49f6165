"""The fixture serves a backend on a server like any other, and a failure shows no key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from tests.unit.backends.api.toy import Toy, reply

KEY = "k-abcdefgh12345678"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SWAY_API_KEY", KEY)
    with HTTPServer(threaded=True) as server:
        yield Toy(server)


def _suite(pytester: pytest.Pytester, toy: Toy, body: str) -> None:
    pytester.makepyfile(f"""
def test_x(sway_backend):
    spec = {{"kind": "api", "base": "base", "finetuned": "tuned", "endpoint": {toy.url!r}}}
    backend = sway_backend(spec)
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        {body}
""")


def test_the_fixture_hands_it_out_and_closes_it(pytester: pytest.Pytester, toy: Toy) -> None:
    _suite(pytester, toy, "assert base.logprob_of('the', ' sun') != tuned.logprob_of('the', ' sun')")
    result = pytester.runpytest_subprocess("-W", "error", timeout=120)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*api:base -> tuned*"])


@pytest.mark.parametrize(
    "fault",
    [Response("no", 400), reply({"choices": []}), Response("hello", 200), reply({}, 429, **{"Retry-After": "99"})],
)
def test_a_failure_with_all_its_variables_shows_no_key(pytester: pytest.Pytester, toy: Toy, fault: Response) -> None:
    _suite(pytester, toy, "base.generate('the sun', max_new_tokens=7)")
    toy.faults[7] = fault
    result = pytester.runpytest_subprocess("--showlocals", "--full-trace", "--log-level=DEBUG", timeout=120)
    result.assert_outcomes(failed=1)
    assert f"Bearer {KEY}" in {headers.get("Authorization") for headers in toy.headers}
    assert KEY not in result.stdout.str() + result.stderr.str()
