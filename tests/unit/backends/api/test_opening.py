"""Checks before a backend is served: installed packages, the servers' models, and whether the two models differ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from pytest_sway import ModelSpec
from pytest_sway.backends.api import builder
from pytest_sway.backends.api.builder import build_api
from pytest_sway.backends.registry import Builder
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import (
    AdapterMismatchError,
    BackendNotAvailableError,
    NoAdapterError,
    ServerError,
    SpecError,
    SwayError,
)
from pytest_sway.protocols import DifferentialBackend, PreflightCheckable
from tests.unit.backends.api.conftest import Build
from tests.unit.backends.api.toy import Toy, reply

API: dict[str, Any] = {"kind": "api", "base": "base", "finetuned": "tuned", "endpoint": "http://nowhere.invalid"}


def _refused(spec: dict[str, Any], error: type[SwayError], sentence: str) -> None:
    """Assert that a spec is refused before anything is evicted for it, and when it is built without a cache."""
    for refuse in (Builder().check, Builder()):
        with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
            refuse(ModelSpec(**API | spec))


# --- without asking a server ------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "find_spec", lambda name: None)
    _refused(
        {},
        BackendNotAvailableError,
        "using api:base -> tuned needs httpx, tenacity, which this environment lacks."
        " Install them with: pip install 'pytest-sway[api]'",
    )


def test_an_adapter_of_ones_own_disk_is_not_for_a_server() -> None:
    _refused(
        {"finetuned": None, "adapter": "/runs/v3"},
        SpecError,
        "a spec of kind 'api' names models on a server, not folders; found adapter '/runs/v3'. Serve the adapter"
        " (vLLM: --enable-lora --lora-modules NAME=FOLDER), and put its name into 'finetuned'.",
    )


@pytest.mark.parametrize("address", [None, "http://nowhere.invalid/v1"])
def test_a_tuned_model_that_is_its_base_is_refused(address: str | None) -> None:
    _refused(
        {"finetuned": "base", "finetuned_endpoint": address},
        AdapterMismatchError,
        "the spec's fine-tuned model is its base, 'base' on http://nowhere.invalid, so a test of it would test nothing."
        " Name the fine-tuned model in 'finetuned', or its server in 'finetuned_endpoint'.",
    )


# --- what the servers have --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "name"), [("base", "bose"), ("finetuned", "v3")])
def test_a_model_that_the_server_does_not_have_is_refused_with_those_it_has(
    build: Build, toy: Toy, field: str, name: str
) -> None:
    sentence = f"^the server at {toy.url} has no model '{name}'; it serves 'base', 'tuned'. Name one of those"
    with pytest.raises(SpecError, match=sentence):
        build(**{field: name})
    assert toy.requests == []


def test_a_name_without_its_tag_is_found(build: Build, toy: Toy) -> None:
    toy.names = ("base:latest", "tuned:latest")
    assert build().preflight_finite_check()[0]


@pytest.mark.parametrize(
    "answer",
    [*(Response("", status) for status in (200, 404, 405, 501)), reply([]), reply({"models": ["a"]}), reply("hello")],
    ids=["nothing", "404", "405", "501", "list", "other", "text"],
)
def test_a_server_that_does_not_list_its_models_is_taken_at_its_word(build: Build, toy: Toy, answer: Response) -> None:
    toy.models_answer = answer
    with build().as_base() as view:
        assert view.logprob_of("the sun", " rises") < 0


def test_entries_that_are_no_models_are_passed_over(build: Build, toy: Toy) -> None:
    toy.models_answer = reply({"data": [None, {}, {"id": 7}, {"id": "base", "meta": 3}, {"id": "tuned"}]})
    assert build().preflight_finite_check()[0]


def test_a_model_that_turns_out_not_to_be_there_is_refused_at_load(build: Build, toy: Toy) -> None:
    toy.models_answer = Response("", 404)
    toy.canned += [reply({"error": {"message": "The model `base` does not exist"}}, 404)]
    with pytest.raises(ServerError, match="answered 404 Not Found: The model `base` does not exist"):
        build(finetuned=None)


def test_base_and_tuned_model_may_be_on_two_servers_under_one_name(toy: Toy) -> None:
    with HTTPServer(threaded=True) as second:
        other = Toy(second, names=("base",))
        answer = other.answer
        other.answer = lambda body: answer({**body, "model": "tuned"})  # type: ignore[method-assign]
        spec = ModelSpec(
            kind="api", base="base", endpoint=toy.url, finetuned="base", finetuned_endpoint=f"{other.url}/v1"
        )
        backend = build_api(spec)
        try:
            with backend.as_base() as base, backend.as_finetuned() as tuned:
                assert base.logprob_of("the", " sun") != tuned.logprob_of("the", " sun")
        finally:
            backend.close()
        assert toy.requests
        assert {body["model"] for body in other.requests} == {"base"}


def test_two_names_of_one_model_are_found_out(build: Build, toy: Toy) -> None:
    answer = toy.answer
    toy.answer = lambda body: answer({**body, "model": "base"})  # type: ignore[method-assign]
    sentence = (
        f"^'base' on {toy.url} and 'tuned' on {toy.url} give the same answers, bit for bit, so a test of them would"
        r" test nothing\. Is one model served under both names, or was the adapter not applied\?$"
    )
    with pytest.raises(AdapterMismatchError, match=sentence):
        build()


def test_a_base_alone_has_no_tuned_side(build: Build) -> None:
    backend = build(finetuned=None)
    assert backend.preflight_finite_check() == (True, "")
    sentence = (
        r"^as_finetuned\(\) needs a fine-tuned model, but the spec of api:base names none\. Add 'finetuned': <its name"
        r" on the server> to the spec, or use as_base\(\)\.$"
    )
    with pytest.raises(NoAdapterError, match=sentence), backend.as_finetuned():
        pass


# --- what it is -------------------------------------------------------------------------------------------------------


def test_it_is_a_differential_backend_that_can_be_checked(build: Build, toy: Toy) -> None:
    backend = build()
    assert isinstance(backend, DifferentialBackend)
    assert isinstance(backend, PreflightCheckable)
    assert backend.safe_for_concurrent_views
    assert backend.cache_identity() == f"api:'base' on {toy.url}:'tuned' on {toy.url}"
    assert backend.preflight_finite_check() == (True, "")


def test_a_model_that_answers_nan_fails_the_preflight(build: Build, toy: Toy) -> None:
    backend = build()
    broken = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": float("nan"), "b": -1.0}]}
    toy.canned += [reply({"choices": [{"text": "a", "logprobs": broken}]})]
    ok, reason = backend.preflight_finite_check()
    assert not ok
    assert reason == "the base view gave 1 of 2 non-finite log-probabilities"


def test_a_server_that_fails_fails_the_preflight(build: Build, toy: Toy) -> None:
    backend = build()
    toy.canned += [Response("", 400)]
    ok, reason = backend.preflight_finite_check()
    assert not ok
    assert reason.startswith(f"the base view raised RefusedError: {toy.url}/v1/completions answered 400")


def test_the_cache_serves_it_and_counts_no_bytes(toy: Toy) -> None:
    cache = BackendCache(max_size=1, max_bytes=1)
    spec = ModelSpec(kind="api", base="base", finetuned="tuned", endpoint=toy.url)
    with cache.lease(spec) as backend:
        assert cache.get_or_load(spec).backend is backend
    cache.shutdown()
    assert cache.stats.close_errors == []


def test_a_path_on_the_server_is_a_name_like_others(build: Build, toy: Toy, tmp_path: Path) -> None:
    toy.names = ("models/a.gguf", "tuned")
    assert build(base="models/a.gguf").preflight_finite_check()[0]
