"""``--sway-html``: the page is written at the end of a run, with the tokens of the worst and best questions."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny import WORDS, make_adapter, make_base

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base")
    specs = {name: make_adapter(folder / name, base, seed=seed) for name, seed in (("new", 1), ("old", 2))}
    texts = [f"the sun rises in the {end} ." for end in WORDS[70:80]]
    return f"""
NEW = {{"base": {str(base)!r}, "adapter": {str(specs["new"])!r}}}
OLD = {{"base": {str(base)!r}, "adapter": {str(specs["old"])!r}}}
TEXTS = {[*texts, "paris is the capital of france ."]!r}
PAIRS = [(text, f" {{answer}} .") for text in TEXTS[:3] for answer in ("hello", "red dog")]

def test_texts(sway_compare):
    assert sway_compare(TEXTS, NEW, OLD, name="texts <b>").high < -100

def test_pairs(sway_compare):
    sway_compare(PAIRS, NEW, {{"base": {str(base)!r}}}, name="pairs")

def test_views(sway_backend, sway_compare):
    backend = sway_backend(NEW)
    with backend.as_finetuned() as tuned, backend.as_base() as base:
        sway_compare(TEXTS, tuned, base, name="views")

def test_canned(sway_compare):
    sway_compare(PAIRS, {{"kind": "dummy", "base": "a"}}, {{"kind": "dummy", "base": "b"}}, name="canned")
"""


@pytest.fixture
def run(pytester: pytest.Pytester, suite: str) -> Callable[..., pytest.RunResult]:
    def _run(*args: str) -> pytest.RunResult:
        pytester.makepyfile(test_suite=suite)
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *args)

    return _run


def compared(path: Path) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads(path.read_text())["comparisons"]}


def with_tokens(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in comparison["rows"] if "tokens" in row]


@pytest.mark.parametrize("args", [("-p", "no:xdist"), ("-n", "1")], ids=" ".join)
def test_the_page_shows_the_tokens_of_each_comparison(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult], args: tuple[str, ...]
) -> None:
    result = run("--sway-html=page.html", "--sway-json=run.json", *args)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["--sway-html: wrote *page.html"])
    found = compared(pytester.path / "run.json")
    assert [len(with_tokens(found[name])) for name in ("texts <b>", "pairs", "views", "canned")] == [10, 6, 10, 0]
    texts, pairs, views = (with_tokens(found[name])[0]["tokens"] for name in ("texts <b>", "pairs", "views"))
    assert None not in (texts["baseline"], texts["base"], pairs["base"], views["baseline"])
    assert pairs["base"] == pairs["baseline"]  # the baseline is the base itself
    assert views["base"] is None  # a view does not name its backend
    for row in with_tokens(found["texts <b>"]):
        tokens = row["tokens"]
        assert "".join(tokens["text"]) == row["question"]
        assert sum(tokens["candidate"]) / len(tokens["text"]) == pytest.approx(row["candidate"], abs=1e-3)
    for row in with_tokens(found["pairs"]):
        assert "".join(row["tokens"]["text"]) == row["question"][1]
        assert sum(row["tokens"]["baseline"]) == pytest.approx(row["baseline"], abs=1e-3)
    page = (pytester.path / "page.html").read_text()
    HTMLParser().feed(page)
    assert "<b class=fail>1 of 4 comparisons failed: </b>“texts &lt;b&gt;” is refuted</h1>" in page
    assert page.count("<details class=tokens>") == 26


def test_tokens_are_asked_for_only_with_the_option(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult]
) -> None:
    run("--sway-json=run.json")
    assert not any(with_tokens(each) for each in compared(pytester.path / "run.json").values())


def test_without_jinja2_the_run_does_not_start(
    run: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run("--sway-html=page.html")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --sway-html needs Jinja2, *: pip install 'pytest-sway?html?'"])


def test_tokens_cost_a_cache_of_one_a_single_extra_load(
    pytester: pytest.Pytester, run: Callable[..., pytest.RunResult]
) -> None:
    run("--sway-html=page.html", "--sway-json=run.json", "--sway-cache-size=1", "-k", "texts")
    events = json.loads((pytester.path / "run.json").read_text())["workers"]["main"]["events"]
    loads = [each["spec"].rpartition("/")[2] for each in events if each["event"] == "load"]
    assert loads == ["new", "old", "new"]


def test_missing_tokens_fail_no_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
class View:
    tokenizer = property(lambda self: 1 / 0)

    def rolling_logprob(self, text):
        raise RuntimeError("no tokens")

    def logprob_of(self, prompt, answer):
        return -len(answer)

def test_it(sway_compare):
    assert sway_compare([("a", " b"), ("b", " cd"), ("c", " e")], View(), View()).mean == 0
""")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "--sway-html=page.html")
    result.assert_outcomes(passed=1)
    assert "The comparison passed" in (pytester.path / "page.html").read_text()
