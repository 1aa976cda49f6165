"""No secret of the environment reaches the terminal or a report, however an error propagates."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Suite

SECRET = "hf_abcdefgh12345678"
PASSWORD = "p4ssw0rd-of-the-hub"


QUOTES = """
import os

def quote():
    return f"401 for {os.environ['HF_TOKEN']} at {os.environ['HF_ENDPOINT']}"

class Stubborn(Exception):
    def __str__(self):
        return quote()
"""
"""Code that shows secrets: in the text of an answer, and in an error that creates its text on demand."""


def test_neither_the_terminal_nor_junit_shows_a_secret(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_ENDPOINT", f"https://someone:{PASSWORD}@hub.example")
    suite.pytester.makepyfile(
        leaky=QUOTES
        + """
import pytest

def with_note():
    error = ValueError("noted")
    error.add_note(quote())
    raise error

def with_cause():
    raise ValueError("caused") from Stubborn()

def with_context():
    try:
        raise OSError(quote())
    except OSError:
        raise ValueError("in a context")

def with_group():
    raise ExceptionGroup("many", [ValueError("x"), Stubborn()])

def plain():
    raise ValueError(quote())

WAYS = {"note": with_note, "cause": with_cause, "context": with_context, "group": with_group, "plain": plain}

class Backend:
    def __init__(self, way, where):
        self.way, self.where = way, where

    def as_base(self):
        raise NotImplementedError

    as_finetuned = as_base

    def at(self, where):
        if where == self.where:
            WAYS[self.way]()

    def changes(self):
        self.at("changes")
        return []

    def leak(self):
        self.at("leak")

    def close(self):
        self.at("close")

@pytest.hookimpl(tryfirst=True)
def pytest_sway_build_backend(spec):
    way, where = spec.base.split("-")
    if where == "load":
        WAYS[way]()
    return Backend(way, where)
"""
    )
    result = suite.run(
        """
@pytest.mark.parametrize("where", ["load", "changes", "leak", "close"])
@pytest.mark.parametrize("way", ["note", "cause", "context", "group", "plain"])
def test_it(sway_backend, way, where):
    sway_backend(dummy(f"{way}-{where}"))
""",
        "-p",
        "leaky",
        "--junitxml=junit.xml",
        "-o",
        "junit_logging=all",
        "-o",
        "log_cli=true",
    )
    result.assert_outcomes(passed=15, failed=5, errors=5)
    shown = result.stdout.str() + result.stderr.str() + (suite.pytester.path / "junit.xml").read_text()
    assert "401 for ***" in shown
    assert "BackendLoadError: loading the dummy backend of base 'group-load' failed: ExceptionGroup: many" in shown
    for secret in (SECRET, PASSWORD):
        assert secret not in shown


NO_EXCEPTIONS = """
import os
import sys
import pytest

class Own(BaseException):
    def __str__(self):
        return f"401 for {os.environ['HF_TOKEN']}"

def own(text):
    raise Own

WAYS = {"fail": pytest.fail, "exit": sys.exit, "own": own}

class Backend:
    def __init__(self, way):
        self.way = way

    def as_base(self):
        raise NotImplementedError

    as_finetuned = as_base

    def close(self):
        WAYS[self.way](f"401 for {os.environ['HF_TOKEN']}")

@pytest.hookimpl(tryfirst=True)
def pytest_sway_build_backend(spec):
    way, _, where = spec.base.partition("-")
    if where == "load":
        Backend(way).close()
    if where == "close":
        return Backend(way)
"""


def test_nor_do_they_show_that_of_what_is_no_exception(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """``pytest.fail`` in a build, and ``sys.exit`` in a script."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    suite.pytester.makepyfile(leaky=NO_EXCEPTIONS)
    result = suite.run(
        """
@pytest.mark.parametrize("where", ["load", "close"])
@pytest.mark.parametrize("way", ["fail", "exit", "own"])
def test_it(sway_cache, way, where):
    sway_cache.get_or_load(dummy(f"{way}-{where}"))
    sway_cache.evict_all()
""",
        "-p",
        "leaky",
        "--junitxml=junit.xml",
    )
    result.assert_outcomes(failed=6)
    shown = result.stdout.str() + result.stderr.str() + (suite.pytester.path / "junit.xml").read_text()
    assert "Failed: 401 for ***" in shown
    assert "SystemExit: 401 for ***" in shown
    assert "Own: 401 for ***" in shown
    assert SECRET not in shown


def test_nor_what_ends_the_run_when_the_session_closes_a_backend(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    suite.pytester.makepyfile(leaky=NO_EXCEPTIONS)
    result = suite.run_apart("def test_it(sway_backend): sway_backend(dummy('own-close'))", "-p", "leaky")
    result.stderr.fnmatch_lines(["leaky.Own: 401 for [*][*][*]"])
    assert SECRET not in result.stdout.str() + result.stderr.str()


SHOWN = {
    "an error": "raise ValueError(quote())",
    "an error that makes its text": "raise Stubborn",
    "what is no Exception and makes its text": "raise Final",
    "a cause": "raise ValueError('caused') from Stubborn()",
    "a group": "raise ExceptionGroup('many', [ValueError('x'), Stubborn()])",
    "a local variable": "here = quote(); raise ValueError('x')",
    "an argument": "fails(quote())",
    "a print": "print(quote()); raise ValueError('x')",
    "a log": "logging.getLogger('hub').warning(quote()); raise ValueError('x')",
    "pytest.fail": "pytest.fail(quote(), pytrace=False)",
    "pytest.skip": "pytest.skip(quote())",
    "pytest.exit": "pytest.exit(quote())",
    "a warning": "warnings.warn(quote())",
    "a thread": "thread = threading.Thread(target=fails, args=[quote()]); thread.start(); thread.join()",
    "an assertion": "return os.environ['HF_TOKEN']",
}


@pytest.mark.parametrize(
    ("way", "workers"), [*((way, "0") for way in SHOWN), ("an error that makes its text", "1"), ("a thread", "1")]
)
def test_nor_what_a_custom_backends_view_or_a_test_brings_forth(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, way: str, workers: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_ENDPOINT", f"https://someone:{PASSWORD}@hub.example")
    suite.pytester.makepyfile(
        mine=QUOTES
        + """
import logging
import threading
import warnings
from contextlib import contextmanager
import pytest

class Final(BaseException):
    __str__ = Stubborn.__str__

def fails(text):
    raise ValueError(text)

class Mine:
    def __init__(self, base_spec, adapter_path):
        pass

    @contextmanager
    def as_base(self):
        yield self

    as_finetuned = as_base

    def logprob_of(self, prompt, completion):
        WAY
""".replace("WAY", SHOWN[way])
    )
    result = suite.run(
        """
def test_it(sway_backend):
    with sway_backend({"kind": "custom", "base": "x", "entry_point": "mine:Mine"}).as_base() as view:
        assert view.logprob_of("a", "b") == "another"
""",
        "-n",
        workers,
        "-rA",
        "--showlocals",
        "--junitxml=junit.xml",
        "-o",
        "junit_logging=all",
    )
    shown = result.stdout.str() + result.stderr.str() + (suite.pytester.path / "junit.xml").read_text()
    assert "***" in shown
    for secret in (SECRET, PASSWORD):
        assert secret not in shown


def test_a_report_without_a_secret_stays_the_same_object(suite: Suite) -> None:
    suite.pytester.makepyfile(
        watches="""
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_logreport(report):
    before = report.longrepr
    yield
    assert report.longrepr is before
"""
    )
    result = suite.run(
        "def test_it(sway_backend):\n    print(1)\n    assert not sway_backend(dummy('a'))", "-p", "watches"
    )
    result.assert_outcomes(failed=1)
