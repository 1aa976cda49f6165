"""No secret of the environment is shown."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import BackendLoadError, SpecError, SwayError, WeightsError
from pytest_sway.run.serving.hygiene import changes
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.redaction import redacted, without_secrets

SECRET = "hf_abcdefgh12345678"


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "SWAY_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"])
def test_the_value_of_a_secret_variable_is_replaced(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redacted(f"GET https://hub/?token={SECRET} failed") == "GET https://hub/?token=*** failed"


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "https_proxy", "DATABASE"])
@pytest.mark.parametrize(
    "text",
    [
        "cannot reach https://someone:p4ss%2Fword@hub.example/api",
        "cannot reach https://someone:p4ss%2Fword@other.example",
        "the password p4ss/word is refused",
        "cannot reach https://someone:short@elsewhere.example",  # no variable holds this one
    ],
)
def test_a_password_in_an_address_is_replaced(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, "https://someone:p4ss%2Fword@hub.example")
    shown = redacted(text)
    assert "***" in shown
    assert not any(secret in shown for secret in ("p4ss", "someone:", "short"))


def test_each_line_of_a_secret_is_hidden_since_pytest_shows_text_by_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCP_CREDENTIALS", '{\n  "private_key": "c0ffee-c0ffee"\n}')
    assert redacted('E         "private_key": "c0ffee-c0ffee"') == "E         ***"
    assert "c0ffee" not in redacted('{"value": "{\\n  \\"private_key\\": \\"c0ffee-c0ffee\\"\\n}"}')


@pytest.mark.parametrize("spelled", ["a+secret/with=signs", "a%2Bsecret%2Fwith%3Dsigns"])
def test_a_secret_is_found_in_the_spelling_of_addresses(monkeypatch: pytest.MonkeyPatch, spelled: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "a+secret/with=signs\n")
    assert redacted(f"?token={spelled}") == "?token=***"


@pytest.mark.parametrize(("name", "value"), [("HF_HOME", "/home/someone/hf"), ("TOKENIZERS_PARALLELISM", "false")])
def test_other_values_stay(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert redacted(f"reading {value} failed") == f"reading {value} failed"


class _StubbornError(Exception):
    def __str__(self) -> str:
        return f"cannot use {SECRET}"


class _FieldError(Exception):
    def __init__(self) -> None:
        super().__init__()
        self.url = f"https://hub/?token={SECRET}"

    def __str__(self) -> str:
        return f"no answer from {self.url}"


def _with(error: BaseException, *, note: str = "", cause: Any = None, context: Any = None) -> Any:
    if note:
        error.add_note(note)
    error.__context__ = context
    if cause is not None:
        error.__cause__ = cause
    return error


QUOTES = f"401 for {SECRET}"
WAYS: dict[str, Callable[[], Exception]] = {
    "its text": lambda: ValueError(QUOTES),
    "a number and a text": lambda: OSError(5, QUOTES),
    "a file's name": lambda: FileNotFoundError(2, "No such file", f"/cache/{SECRET}"),
    "a key": lambda: KeyError(("header", {"token": [SECRET]})),
    "bytes": lambda: ValueError(QUOTES.encode()),
    "an import": lambda: ImportError(QUOTES, name="x", path=f"/{SECRET}"),
    "a field": _FieldError,
    "code": _StubbornError,
    "a note": lambda: _with(ValueError("refused"), note=QUOTES),
    "a cause": lambda: _with(ValueError("refused"), cause=OSError(QUOTES)),
    "a cause that is code": lambda: _with(ValueError("refused"), cause=_StubbornError()),
    "a context": lambda: _with(ValueError("refused"), context=OSError(QUOTES)),
    "the context of a cause": lambda: _with(ValueError("x"), cause=_with(OSError("y"), context=_StubbornError())),
    "a group's message": lambda: ExceptionGroup(QUOTES, [ValueError("x")]),
    "a member of a group": lambda: ExceptionGroup("two", [ValueError("x"), OSError(QUOTES)]),
    "a group in a group": lambda: ExceptionGroup("one", [ExceptionGroup("two", [_StubbornError()])]),
    "the note of a group's member": lambda: ExceptionGroup("one", [_with(ValueError("x"), note=QUOTES)]),
    "the cause of a group's member": lambda: ExceptionGroup("one", [_with(ValueError("x"), cause=OSError(QUOTES))]),
    "a group as a cause": lambda: _with(ValueError("x"), cause=ExceptionGroup("one", [_StubbornError()])),
}
each_way = pytest.mark.parametrize("make", WAYS.values(), ids=WAYS.keys())


def _shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _build(act: Callable[[], Any]) -> Callable[..., Any]:
    def build(spec: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        return act()

    return build


def _raising(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


@each_way
def test_an_error_of_a_load_shows_no_secret(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Exception]) -> None:
    error = make()
    assert SECRET in _shown(error)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(BackendLoadError) as caught:
        BackendCache(build=_build(_raising(error))).get_or_load({"kind": "dummy", "base": "b"})
    shown = _shown(caught.value)
    assert SECRET not in shown
    assert "***" in shown
    assert "in act" in shown  # the frame that raised it


@each_way
def test_an_error_of_this_package_shows_none_that_is_behind_it(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Exception]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    error = WeightsError(f"cannot be read: {SECRET}")
    error.__cause__ = make()
    with pytest.raises(WeightsError, match=r"^cannot be read: \*\*\*$") as caught:
        BackendCache(build=_build(_raising(error))).get_or_load({"kind": "dummy", "base": "b"})
    assert caught.value is error
    assert SECRET not in _shown(caught.value)


@each_way
def test_a_close_that_raises_with_a_secret_is_reported_and_logged_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make: Callable[[], Exception]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    error = make()

    class Backend:
        def close(self) -> None:
            raise error

    cache = BackendCache(build=_build(Backend))
    cache.get_or_load({"kind": "dummy", "base": "b"})
    with caplog.at_level(logging.WARNING, "pytest_sway.cache"):
        cache.evict_all()
    (line,) = cache.stats.close_errors
    assert line.startswith(f"closing dummy:b failed: {type(error).__name__}: ")
    assert SECRET not in line + caplog.text
    assert "Traceback" in caplog.text


@each_way
def test_a_comparison_error_hides_a_secret(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Exception]) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    error = make()

    class Backend:
        def changes(self) -> list[str]:
            raise error

    (line,) = changes(Backend())
    assert line.startswith(f"comparing it with its state after the load failed: {type(error).__name__}: ")
    assert SECRET not in line


def test_a_mutation_message_hides_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)

    class Backend:
        def changes(self) -> list[str]:
            return [f"config.token is now {SECRET}"]

    assert changes(Backend()) == ["config.token is now ***"]


def test_a_secret_in_a_field_of_a_spec_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(SpecError, match=r"spec field 'dtype' must be one of .*; found '\*\*\*'") as caught:
        BackendCache(build=_build(dict)).get_or_load({"kind": "dummy", "base": "b", "dtype": SECRET})
    assert SECRET not in _shown(caught.value)


def test_errors_that_lead_in_a_circle_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    inner = _StubbornError()
    error = _with(SwayError(QUOTES), cause=inner)
    inner.__context__ = error
    assert without_secrets(error) is error
    assert SECRET not in _shown(error)


def test_an_error_that_quotes_no_secret_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    args = (2, ["No such file"])
    group = ExceptionGroup("one", [OSError(*args)])
    assert without_secrets(group) is group
    assert group.exceptions[0].args is not None
    assert group.exceptions[0].args[1] is args[1]
    assert _with(ValueError("x"), cause=group).__cause__ is group


class _StubbornExit(BaseException):
    def __str__(self) -> str:
        return f"cannot use {SECRET}"


def test_what_is_no_exception_and_makes_its_text_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    error = _StubbornExit()
    assert without_secrets(error) is error
    assert isinstance(error, _StubbornExit)
    assert traceback.format_exception_only(error) == [f"{__name__}._StubbornExit: cannot use ***\n"]
