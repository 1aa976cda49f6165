"""Server addresses: one normal form, and no secret in a spec or an error."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_sway import ModelSpec
from pytest_sway.errors import SpecError
from pytest_sway.spec.identity import base_spec
from pytest_sway.spec.parsing import parse_spec

SECRET = "hunter2-hunter2"
API: dict[str, Any] = {"kind": "api", "base": "base"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/", "http://localhost:8000"),
        (" http://localhost:8000/v1 ", "http://localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("HTTPS://API.Example.org/proxy/v1", "https://api.example.org/proxy"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_the_forms_of_an_address_are_one_endpoint(given: str, kept: str) -> None:
    spec = ModelSpec(**API, endpoint=given, finetuned="tuned", finetuned_endpoint=given)
    assert (spec.endpoint, spec.finetuned_endpoint) == (kept, kept)


@pytest.mark.parametrize(
    "address",
    [
        f"http://user:{SECRET}@localhost:8000",
        f"http://{SECRET}@localhost",
        f"http://localhost/v1?key={SECRET}",
        f"http://localhost/v1#{SECRET}",
    ],
)
@pytest.mark.parametrize("field", ["endpoint", "finetuned_endpoint"])
def test_an_address_with_a_secret_is_refused_without_repeating_it(field: str, address: str) -> None:
    sentence = f"^spec field '{field}' must be an address without user name, password, query and fragment, since specs"
    with pytest.raises(SpecError, match=sentence) as raised:
        parse_spec({**API, "finetuned": "tuned", "endpoint": "http://localhost", field: address})
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://localhost", "http://", "v1"])
def test_what_is_no_address_of_a_server_is_refused(address: str) -> None:
    sentence = f"^spec field 'endpoint' must be an address such as 'http://host:port', .*; found '{address}'.$"
    with pytest.raises(SpecError, match=sentence):
        ModelSpec(**API, endpoint=address)


@pytest.mark.parametrize("address", [f"http://user:{SECRET}", "http://localhost:99999", "http://[::1"])
def test_what_cannot_be_parsed_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(
        SpecError, match=r"^spec field 'endpoint' must be an address .*; it cannot be parsed\.$"
    ) as raised:
        ModelSpec(**API, endpoint=address)
    assert SECRET not in str(raised.value)
    assert raised.value.__suppress_context__  # urllib's error quotes it


@pytest.mark.parametrize("name", ["SWAY_API_KEY", "OPENAI_API_KEY", "KEY_2"])
def test_a_key_is_named_by_its_variable(name: str) -> None:
    assert ModelSpec(**API, endpoint="http://localhost", api_key_env=name).api_key_env == name


def test_the_name_of_a_variable_that_is_set_may_be_of_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("my_key", SECRET)
    assert ModelSpec(**API, endpoint="http://localhost", api_key_env="my_key").api_key_env == "my_key"


@pytest.mark.parametrize("value", [f"sk-{SECRET}", "sk_live_abcdefgh", "", 7])
def test_a_key_in_place_of_its_variable_is_refused_without_repeating_it(value: Any) -> None:
    sentence = r"^spec field 'api_key_env' must be the name of .* such as 'SWAY_API_KEY', or None\."
    with pytest.raises(SpecError, match=sentence) as raised:
        ModelSpec(**API, endpoint="http://localhost", api_key_env=value)
    assert not value or str(value) not in str(raised.value)


def test_the_spec_of_a_base_has_no_address_of_a_tuned_model() -> None:
    spec = ModelSpec(**API, endpoint="http://localhost", finetuned="tuned", finetuned_endpoint="http://localhost:2")
    assert base_spec(spec) == ModelSpec(**API, endpoint="http://localhost")
