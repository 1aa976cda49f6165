"""No secret of the environment is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_sway.cache import BackendCache
from pytest_sway.errors import BackendLoadError
from pytest_sway.redaction import redact_error, redacted
from pytest_sway.spec import ModelSpec

SECRET = "hf_abcdefgh12345678"


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "SWAY_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"])
def test_the_value_of_a_secret_variable_is_replaced(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redacted(f"GET https://hub/?token={SECRET} failed") == "GET https://hub/?token=*** failed"


@pytest.mark.parametrize(("name", "value"), [("HF_HOME", "/home/someone/hf"), ("TOKENIZERS_PARALLELISM", "false")])
def test_other_values_stay(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert redacted(f"reading {value} failed") == f"reading {value} failed"


class _StubbornError(Exception):
    def __str__(self) -> str:
        return f"cannot use {SECRET}"


@pytest.mark.parametrize("error", [OSError(f"401 for {SECRET}"), _StubbornError()])
def test_an_error_of_a_load_shows_no_secret_and_neither_does_its_cause(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)

    def build(spec: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        raise error

    with pytest.raises(BackendLoadError, match=r"\*\*\*") as caught:
        BackendCache(build=build).get_or_load({"kind": "dummy", "base": "b"})
    assert SECRET not in str(caught.value)
    assert SECRET not in str(caught.value.__cause__)


def test_a_close_that_raises_with_a_secret_is_reported_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)

    class Backend:
        def close(self) -> None:
            raise OSError(f"401 for {SECRET}")

    def build(spec: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        return Backend()

    cache = BackendCache(build=build)
    cache.get_or_load({"kind": "dummy", "base": "b"})
    cache.evict_all()
    assert cache.stats.close_errors == ["closing dummy:b failed: OSError: 401 for ***"]


def test_an_error_that_quotes_no_secret_keeps_its_arguments() -> None:
    error = OSError(2, "No such file")
    assert redact_error(error)
    assert error.args == (2, "No such file")
