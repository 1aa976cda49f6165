"""The fixture ``sway_compare``: its sides, its report of a failing test, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.tiny import make_adapter, make_base

SUITE = """
import math
import pytest
from pytest_sway import ModelSpec

FACTS = [(f"the sun rises for the {n} time in the", f" east {n}") for n in range(12)]
NEW = {"kind": "dummy", "base": "new"}
OLD = {"kind": "dummy", "base": "old"}

def canned(shift, kind="logprobs"):
    side = {"logprobs": {prompt: {answer: -1.0 + shift * (n + 1)} for n, (prompt, answer) in enumerate(FACTS)}}
    return {"kind": "dummy", "base": f"shifted {shift}", "answers": {"finetuned": side}}
"""


def run(pytester: pytest.Pytester, body: str, *args: str, specs: str = "") -> pytest.RunResult:
    pytester.makepyprojecttoml(f'[tool.pytest.ini_options]\nminversion = "8.0"\n{specs}')
    pytester.makepyfile(test_suite=SUITE + body)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *args)


NAMED = """
[tool.pytest-sway.specs]
new = { kind = "dummy", base = "a" }
old = { kind = "dummy", base = "b" }
"""


def test_a_side_is_a_view_a_spec_or_a_name(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
def test_it(sway_backend, sway_compare):
    by_name = sway_compare(FACTS, "new", "old")
    assert (by_name.n, by_name.mean, by_name.confidence) == (12, 0.0, 0.99)  # both generate the same answers
    backend = sway_backend("new")
    with backend.as_finetuned() as tuned, backend.as_base() as base:
        by_view = sway_compare(FACTS, tuned, base)
        assert by_view.low > 0
        assert sway_compare(FACTS, ModelSpec(**NEW), base).rows == by_view.rows
        assert sway_compare(FACTS, OLD, base).mean == by_view.mean
        expected = [tuned.logprob_of(*pair) - base.logprob_of(*pair) for pair in FACTS]
    assert [row.difference for row in by_view.rows] == expected
    assert by_view.mean == pytest.approx(sum(expected) / 12)
""",
        specs=NAMED,
    )
    result.assert_outcomes(passed=1)


def test_a_spec_without_an_adapter_is_its_base(pytester: pytest.Pytester, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    result = run(
        pytester,
        f"""
BASE = {{"base": {str(base)!r}}}
TUNED = {{**BASE, "adapter": {str(adapter)!r}}}
TEXTS = ["the sun rises in the east .", "paris is the capital of france", "hello world"]

def test_texts_are_nats_per_token(sway_backend, sway_compare):
    comparison = sway_compare(TEXTS, TUNED, BASE)
    with sway_backend(TUNED).as_finetuned() as tuned, sway_backend(BASE).as_base() as base:
        for text, row in zip(TEXTS, comparison.rows):
            assert row.candidate == pytest.approx(tuned.rolling_logprob(text).mean_logprob)
            assert row.baseline == pytest.approx(base.rolling_logprob(text).mean_logprob)
    assert comparison.unit == "nats per token"
    assert comparison.low < comparison.mean < comparison.high

def test_a_model_against_itself_is_exactly_0(sway_compare):
    itself = sway_compare(TEXTS, TUNED, TUNED)
    assert (itself.mean, itself.low, itself.high) == (0.0, 0.0, 0.0)

def test_noise_in_the_adapters_place_is_a_side(sway_backend, sway_compare):
    backend = sway_backend(TUNED)
    with backend.as_finetuned() as tuned, backend.as_null_adapter(seed=1) as noise:
        assert sway_compare(TEXTS, tuned, noise).baseline == "null_1"
""",
    )
    result.assert_outcomes(passed=3)


def test_the_names_of_the_sides_differ_if_their_models_do(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
def names(comparison):
    return comparison.candidate, comparison.baseline, comparison.name

def test_views_of_two_specs(sway_backend, sway_compare):
    with sway_backend(NEW).as_finetuned() as new, sway_backend(OLD).as_finetuned() as old:
        sides = ("ft of dummy:new", "ft of dummy:old")
        assert names(sway_compare(FACTS, new, old)) == (*sides, "ft of dummy:new against ft of dummy:old")

def test_views_of_one_spec(sway_backend, sway_compare):
    backend = sway_backend(NEW)
    with backend.as_finetuned() as one, backend.as_finetuned() as other:
        assert names(sway_compare(FACTS, one, other))[:2] == (
            "ft of dummy:new (candidate)", "ft of dummy:new (baseline)"
        )
        assert names(sway_compare(FACTS, one, one)) == ("ft", "ft", "ft against ft")

def test_specs_with_one_label(sway_compare):
    other = {"kind": "dummy", "base": "new", "answers": {"finetuned": {"generations": {"a": "b"}}}}
    assert names(sway_compare(FACTS, NEW, other))[:2] == ("dummy:new (candidate)", "dummy:new (baseline)")

def test_views_of_ones_own(sway_backend, sway_compare):
    class View:
        id = "mine"
        def logprob_of(self, prompt, answer):
            return 0.5
    assert names(sway_compare(FACTS, View(), View()))[:2] == ("mine (candidate)", "mine (baseline)")
""",
    )
    result.assert_outcomes(passed=4)


def test_a_test_may_compare_more_models_than_the_cache_holds(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
def test_it(sway_backend, sway_compare):
    sway_backend(NEW)
    for step in range(3):
        assert sway_compare(FACTS, canned(0.1 * step + 0.1), canned(0.1 * step)).low > 0
""",
        "--sway-cache-size=2",
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["peak: 2 backends*"])


def test_scores_of_a_users_function_are_compared(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
def exact(view, questions):
    return [view.generate(prompt, max_new_tokens=1) == " finetuned0" for prompt in questions]

def test_it(sway_backend, sway_compare):
    prompts = [prompt for prompt, _ in FACTS]
    with sway_backend(NEW).as_base() as base:
        better = sway_compare(prompts, NEW, base, score=exact)
        equal = sway_compare(prompts, NEW, OLD, score=exact)
    assert (better.mean, better.high, better.unit) == (1.0, 1.0, "points")
    assert equal.mean == 0.0
    assert equal.low < 0.0 < equal.high  # two models that agree on 12 prompts may differ on others
    itself = sway_compare(prompts, NEW, NEW, score=exact)
    assert (itself.low, itself.high) == (0.0, 0.0)
""",
    )
    result.assert_outcomes(passed=1)


def test_how_far_a_side_has_moved_from_a_view_is_compared_in_nats(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
from pytest_sway.errors import ViewClosedError
from pytest_sway.scores import js_from, multiple_choice

def test_it(sway_backend, sway_compare):
    prompts = [prompt for prompt, _ in FACTS]
    backend = sway_backend(NEW)
    with backend.as_base() as base, backend.as_finetuned() as tuned, backend.as_scaled_adapter(0.5) as half:
        farther = sway_compare(prompts, tuned, half, score=js_from(base))
        assert (farther.unit, farther.high < 0.0) == ("nats", True)
        assert sway_compare(prompts, half, base, score=js_from(base)).rows[0].baseline == 0.0
        with backend.as_base() as reference:
            score = js_from(reference)
        with pytest.raises(ViewClosedError, match="the view 'base' was used after its `with` block"):
            sway_compare(prompts, tuned, half, score=score)

def test_an_accuracy_has_the_interval_of_proportions(sway_compare):
    questions = [(prompt, ["one", "two"], n % 2) for n, (prompt, _) in enumerate(FACTS)]
    comparison = sway_compare(questions, NEW, OLD, score=multiple_choice())
    assert (comparison.mean, comparison.unit) == (0.0, "right answers")
    assert comparison.low < 0.0 < comparison.high
""",
    )
    result.assert_outcomes(passed=2)


def test_a_failing_test_shows_the_interval_and_the_worst_questions(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
def test_it(sway_compare):
    assert sway_compare(FACTS, canned(-0.5), canned(0.0), name="the town").high >= 0
""",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E *assert -* >= 0",
            "*- sway_compare -*",
            "the town: dummy:shifted -0.5 - dummy:shifted 0.0 = -3.25 nats an answer",
            "99% interval -* to -*, 12 prompts",
            "over 0: refuted",
            "this many prompts detect a shift of * with 80% power; half of it takes about * prompts",
            "the worst 5 of 12:",
            "difference   candidate    baseline  question",
            "        -6          -7          -1  the sun rises for the 11 time in the east 11",
            "      -5.5        -6.5          -1  the sun rises for the 10 time in the east 10",
        ]
    )


@pytest.mark.parametrize(
    ("asserted", "verdict"),
    [
        ("c.low > -4.0", "over -4: undecided, needs about [0-9]* prompts"),
        ("-4 < c.low", "over -4: undecided, needs about [0-9]* prompts"),
        ("c.high < -3", "under -3: undecided, needs about [0-9]* prompts"),
        ("c.low > -1", "over -1: refuted"),
        ("c.high <= -6.0", "under -6: refuted"),
        ("-6.0 >= c.high", "under -6: refuted"),
    ],
)
def test_a_failing_test_says_whether_its_claim_is_refuted_or_undecided(
    pytester: pytest.Pytester, asserted: str, verdict: str
) -> None:
    body = (
        f"def test_it(sway_compare):\n    c = sway_compare(FACTS, canned(-0.5), canned(0.0))\n    assert {asserted}\n"
    )
    result = run(pytester, body)
    result.stdout.fnmatch_lines(["99% interval -* to -*, 12 prompts", verdict, f"*nats an answer  {verdict}"])


@pytest.mark.parametrize("asserted", ["c.mean > 0", "c.low == 0", "c.low > 'x'", "c.n > 12", "c.low > float('nan')"])
def test_an_assertion_of_something_else_has_no_verdict(pytester: pytest.Pytester, asserted: str) -> None:
    body = (
        f"def test_it(sway_compare):\n    c = sway_compare(FACTS, canned(-0.5), canned(0.0))\n    assert {asserted}\n"
    )
    output = run(pytester, body).stdout
    output.fnmatch_lines(["99% interval -* to -*, 12 prompts", "this many prompts *"])
    assert "refuted" not in output.str()
    assert "undecided" not in output.str()
    output.fnmatch_lines(["*nats an answer  under 0: shown"])


def test_a_side_that_cannot_be_loaded_fails_the_test_at_its_own_line(pytester: pytest.Pytester) -> None:
    lost = {"kind": "custom", "base": "b", "entry_point": "nowhere:Lost"}
    result = run(pytester, f"def test_it(sway_compare):\n    assert sway_compare(FACTS, {lost!r}, OLD).low > 0\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([">       assert sway_compare(*", "E *Error: *nowhere*", "", "test_suite.py:*"])
    result.stdout.no_fnmatch_line("*contextlib*")


def test_a_passing_test_shows_nothing(pytester: pytest.Pytester) -> None:
    result = run(pytester, "def test_it(sway_compare):\n    assert sway_compare(FACTS, NEW, OLD).high >= 0\n", "-rA")
    result.assert_outcomes(passed=1)
    assert "- sway_compare -" not in result.stdout.str()


def test_workers_hand_over_what_a_failing_test_shows(pytester: pytest.Pytester) -> None:
    body = "def test_it(sway_compare):\n    assert sway_compare(FACTS, canned(-0.5), canned(0.0)).high >= 0\n"
    result = run(pytester, body, "-n", "1")
    result.stdout.fnmatch_lines(["*- sway_compare -*", "dummy:shifted -0.5 against dummy:shifted 0.0: *"])


def test_a_comparison_cannot_pass_by_accident(pytester: pytest.Pytester) -> None:
    result = run(pytester, "def test_it(sway_compare):\n    assert sway_compare(FACTS, NEW, OLD)\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E *TypeError: a Comparison is neither true nor false: assert one of its numbers, such as"
            " sway_compare(...).low > -0.1. This one is <Comparison 'dummy:new against dummy:old': mean +0, 99%"
            " interval +0 to +0 nats an answer, 12 prompts>."
        ]
    )


def test_the_confidence_is_a_setting(pytester: pytest.Pytester) -> None:
    body = "def test_it(sway_compare):\n    assert sway_compare(FACTS, NEW, OLD).confidence == 0.9\n"
    result = run(pytester, body, "-o", "sway_confidence=0.9")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["sway: *, confidence 0.9"])
    for value in ("high", "1", "0.4", "nan"):
        result = run(pytester, body, "-o", f"sway_confidence={value}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert (
            f"ERROR: ini value sway_confidence: must be a number from 0.5 to 0.9999, such as 0.99;"
            f" found '{value}'." in result.stderr.str()
        )


BAD = {
    'FACTS, "nwe", OLD': "no spec is named 'nwe' (named specs: new, old).*",
    "FACTS, None, OLD": "sway_compare needs a candidate: *",
    "FACTS, 3, OLD": "the candidate of a comparison must be a view, a spec or a configured name; found int: 3.",
    "FACTS, NEW, sway_backend(OLD)": "the baseline is a backend, which has two views. Open the view that you*",
    "FACTS[:1], NEW, OLD": "a comparison needs at least 2 different prompts, and there are 1: *",
    "[], NEW, OLD": "a comparison needs at least 2 different prompts, and there are 0: *",
    "'the sun', NEW, OLD": "expected a list of questions; found 'the sun'.*",
    "[('a', ' b'), ('a', ' c')], NEW, OLD": "a comparison needs at least 2 different prompts, and there are 1: *",
    "[*FACTS, 'a text'], NEW, OLD": "all questions must be of one kind, but questions?0? is a pair and questions?12? *",
    "[*FACTS, FACTS[3]], NEW, OLD": "questions?12? repeats questions?3? (('the sun rises for the 3 time in *",
    "[{'a': 1}, {'a': 2}], NEW, OLD": "a question is a text, or a pair of a prompt and an answer; questions?0? is *",
    "['a b', ''], NEW, OLD": "questions?1? has no token to score. Remove the text.",
    "FACTS, NEW, OLD, score=3": "score= is a function of a view and the questions; found 3.",
    "FACTS, NEW, OLD, score=lambda view, asked: [1.0]": "*one number for each question; found 1 for 12 questions of *",
    "FACTS, NEW, OLD, score=lambda view, asked: 1.0": "score= gives one number for each question; found 1.0 for *",
    "FACTS, NEW, OLD, score=lambda view, asked: ['1'] * 12": "the score of questions?0? (*) is '1' for dummy:new; a *",
    "FACTS, NEW, OLD, score=lambda view, asked: [1.0] * 11 + [math.nan]": "the score of questions?11? (*) is nan for *",
    "FACTS, NEW, OLD, score=lambda view, asked: [1e101] * 12": "*1e+101*finite numbers, from -1e+100 to 1e+100.",
    "FACTS, NEW, OLD, name=8": "name= is what reports call the comparison, a text on one line, such as 'the town'; *",
    "FACTS, NEW, OLD, name=' '": "name= is what reports call the comparison, a text on one line, *; found ' '.",
    "FACTS, NEW, OLD, name='two\\nlines'": "name= is what reports call the comparison, a text on one line, *",
}


def test_bad_input_is_one_error_that_names_its_page(pytester: pytest.Pytester) -> None:
    body = "".join(
        f"def test_{at}(sway_backend, sway_compare):\n    sway_compare({arguments})\n\n"
        for at, arguments in enumerate(BAD)
    )
    result = run(pytester, body, "--tb=short", specs=NAMED)
    result.assert_outcomes(failed=len(BAD))
    result.stdout.fnmatch_lines([f"E *Error: {message}" for message in BAD.values()])
    assert result.stdout.str().count("in the docs of pytest-sway: reference/errors.md#comparisonerror") == len(BAD) - 1


def test_without_scipy_the_error_says_how_to_install_it(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
def test_it(sway_compare, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    sway_compare(FACTS, NEW, OLD)
""",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *BackendNotAvailableError: sway_compare needs scipy, *: pip install 'pytest-sway?compare?'"]
    )


# --- the table at the end, and test reports ---------------------------------------------------------------------------

THREE = """
def test_good(sway_compare):
    sway_compare(FACTS, canned(0.5), canned(0.0), name="good")
    sway_compare(FACTS, NEW, OLD, name="equal")

def test_bad(sway_compare):
    assert sway_compare(FACTS, canned(-0.5), canned(0.0), name="bad").high >= 0

def test_other(sway_backend):
    sway_backend(NEW)
"""


@pytest.mark.parametrize("args", [("-p", "no:xdist"), ("-n", "2")], ids=" ".join)
def test_the_run_ends_with_a_table_failures_first(pytester: pytest.Pytester, args: tuple[str, ...]) -> None:
    result = run(pytester, THREE, *args)
    result.assert_outcomes(passed=2, failed=1)
    lines = result.outlines
    table = lines[lines.index("=============================== sway comparisons ===============================") :]
    pytest.LineMatcher(table).re_match_lines(
        [
            r"comparison  outcome  prompts   mean     low    high +p  unit +shown$",
            r"bad         failed        12  -3\.25  -4\.\d+  -1\.\d+  0\.000\d+  nats an answer  over 0: refuted$",
            r"good        passed        12  \+3\.25  \+1\.\d+  \+4\.\d+  0\.000\d+  nats an answer  over 0: shown$",
            r"equal       passed        12     \+0      \+0      \+0 +1  nats an answer  exactly 0$",
            r"low to high: 99% confidence interval of the mean; p: p-value of no difference \(Holm, 3 comparisons\)$",
            r"shown: the verdict on the asserted margin, or on 0 if the margin is not known$",
        ]
    )


def test_a_run_that_compares_nothing_has_no_table(pytester: pytest.Pytester) -> None:
    assert "comparisons" not in run(pytester, "def test_other(sway_backend):\n    sway_backend(NEW)\n").stdout.str()


def test_junit_has_each_comparison_as_a_property_of_its_test(pytester: pytest.Pytester) -> None:
    run(pytester, THREE, "--junitxml=junit.xml")
    cases = {case.get("name"): case for case in ElementTree.parse(pytester.path / "junit.xml").iter("testcase")}
    found = {
        name: [
            json.loads(each.get("value", "")) for each in case.iter("property") if each.get("name") == "sway_compare"
        ]
        for name, case in cases.items()
    }
    assert [each["name"] for each in found["test_good"]] == ["good", "equal"]
    assert found["test_other"] == []
    (bad,) = found["test_bad"]
    assert (bad["candidate"], bad["baseline"], bad["n"]) == ("dummy:shifted -0.5", "dummy:shifted 0.0", 12)
    assert bad["mean"] == pytest.approx(-3.25)
    assert bad["low"] < bad["mean"] < bad["high"] < 0


TWICE = """
import pytest
from _pytest.runner import runtestprotocol

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    for last in (False, True):
        item._initrequest()
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            if not last and report.when == "call":
                report.outcome = "rerun"
            item.ihook.pytest_runtest_logreport(report=report)
            if report.outcome == "rerun":
                break
    return True

def pytest_report_teststatus(report):
    if report.outcome == "rerun":
        return "rerun", "R", "RERUN"
"""
"""A conftest.py that runs each test twice and reports it as pytest-rerunfailures does."""


NESTS = """
pytest_plugins = ["pytester"]
D = {"kind": "dummy", "base": "town"}
Q = [(f"p{n}", f" a{n}") for n in range(12)]
INNER = f'''
D, Q = {D!r}, {Q!r}
def test_inner(sway_compare):
    assert sway_compare(Q, D, D).mean == 0
'''

def test_outer(pytester, sway_compare):
    pytester.makepyfile(INNER)
    for _ in range(2):
        pytester.runpytest_inprocess("-p", "no:sway").assert_outcomes(passed=1)  # dlm-sway imports numpy
    assert sway_compare(Q, D, D).mean == 0
"""


def test_a_test_compares_after_pytest_runs_of_its_own(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(NESTS)
    pytester.runpytest_subprocess(timeout=120).assert_outcomes(passed=1)


def test_a_try_that_is_run_again_counts_once(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(TWICE)
    result = run(
        pytester,
        """
TRIES = []

def test_it(sway_compare):
    TRIES.append(1)
    assert sway_compare(FACTS, canned(0.1 * len(TRIES)), canned(0.0), name="one").low > 0
""",
    )
    table = [line.split() for line in result.outlines if line.startswith("one ")]
    assert [row[:4] for row in table] == [["one", "passed", "12", "+1.3"]]


def test_a_last_try_that_compares_nothing_discards_the_try_before(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(TWICE)
    result = run(
        pytester,
        """
TRIES = []

def test_it(sway_compare):
    TRIES.append(1)
    if len(TRIES) == 1:
        assert sway_compare(FACTS, canned(-0.1), canned(0.0), name="one").low > 0
""",
        "--junitxml=junit.xml",
    )
    result.assert_outcomes(passed=1)
    assert "comparisons" not in result.stdout.str()
    assert 'name="sway_compare"' not in (pytester.path / "junit.xml").read_text()


@pytest.mark.parametrize(
    ("asserted", "shown"),
    [
        ("c.low > -1.0", "over -1: shown"),
        ("c.high >= MARGIN", "over 0.5: shown"),
        ("99 > c.high, 'why'", "under 99: shown"),
        ("c.high >= 1.7", "over 1.7: undecided, needs about * prompts"),
        ("c.n > 2", "over 0: shown"),
        ("not c.high < -1", "over 0: shown"),
        ("c.low > -1 and c.high < 99", "under 99: shown"),
        ("c.low > 99 or c.low > -1", "over -1: shown"),
        ("not (c.low < -99 or c.high > 99)", "over 0: shown"),
    ],
)
def test_the_claim_of_a_passing_test_is_known_with_pytests_assertion_pass_hook(
    pytester: pytest.Pytester, asserted: str, shown: str
) -> None:
    body = f"""
MARGIN = 0.5

def test_it(sway_compare):
    c = sway_compare(FACTS, canned(0.5), canned(0.0))
    assert {asserted}
"""
    result = run(pytester, body, "-o", "enable_assertion_pass_hook=true")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"dummy:* against * nats an answer  {shown}"])


def test_an_assertion_of_other_numbers_leaves_the_claim_of_an_equal_bound(pytester: pytest.Pytester) -> None:
    body = """
def test_it(sway_compare):
    first = sway_compare(FACTS, NEW, NEW, name="first")
    assert first.low > -0.5
    second = sway_compare(FACTS, NEW, NEW, name="second")
    assert second.high >= 0
    third = sway_compare(FACTS, NEW, NEW, name="third")
    assert third.low > -0.1
    assert third.detectable < 1.0
    assert third.n > 0
"""
    result = run(pytester, body, "-o", "enable_assertion_pass_hook=true")
    result.assert_outcomes(passed=1)
    expected = ["first *  over -0.5: shown", "second *  exactly 0", "third *  over -0.1: shown"]
    result.stdout.fnmatch_lines(expected)


@pytest.mark.parametrize("negated", ["c.high < -1", "(c.low < -99 or c.high < -1)"])
def test_a_failing_negation_has_no_verdict(pytester: pytest.Pytester, negated: str) -> None:
    body = f"""
def test_it(sway_compare):
    c = sway_compare(FACTS, canned(-0.5), canned(0.0))
    assert not {negated}
"""
    result = run(pytester, body)
    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("under -*: *")
    result.stdout.fnmatch_lines(["*nats an answer  under 0: shown"])


UNITTEST = """
import unittest

class TestIt(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def compare(self, sway_compare):
        self.compare = sway_compare

    def test_it(self):
"""


def test_a_failing_test_of_unittest_has_its_verdict(pytester: pytest.Pytester) -> None:
    result = run(pytester, f"{UNITTEST}        assert self.compare(FACTS, NEW, OLD).low > 99\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["over 99: refuted"])


def test_a_claim_in_an_error_that_the_test_expects_is_none(pytester: pytest.Pytester) -> None:
    body = """
def test_it(sway_compare):
    with pytest.raises(AssertionError):
        assert sway_compare(FACTS, canned(0.5), canned(0.0)).low > 99
"""
    result = run(pytester, body)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*nats an answer  over 0: shown"])


def test_control_characters_in_the_name_of_a_view_reach_no_terminal(pytester: pytest.Pytester) -> None:
    body = """
class View:
    id = "new\\nline \\x1b[31m"

    def logprob_of(self, prompt, answer):
        return -1.0

def test_it(sway_compare):
    assert sway_compare(FACTS, View(), NEW).n == 12
"""
    result = run(pytester, body)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([r"new\nline \x1b[[]31m against dummy:new *"])


REGISTERING = """
import pytest

NAME, WHEN = {name!r}, {when!r}

def pytest_configure(config):
    usual, left = config.pluginmanager.register, [NAME]

    def register(plugin, name=None):
        if name not in left:
            return usual(plugin, name)
        left.remove(name)
        if WHEN == "after":
            usual(plugin, name)
        raise RuntimeError("not now")

    config.pluginmanager.register = register
"""


@pytest.mark.parametrize("name", ["pytest_sway_collected", "pytest_sway_regression", "pytest_sway_secrets"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_could_not_be_registered_for_one_test_are_for_the_next(
    pytester: pytest.Pytester, name: str, when: str
) -> None:
    pytester.makeconftest(REGISTERING.format(name=name, when=when))
    result = run(
        pytester,
        """
def test_first(sway_compare): pass

def test_next(sway_compare, request):
    assert sway_compare(FACTS, canned(0.1), OLD).n == 12
    plugins = request.config.pluginmanager
    for name in ("pytest_sway_collected", "pytest_sway_regression", "pytest_sway_secrets"):
        assert plugins.has_plugin(name), name
""",
    )
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*sway comparisons*", "*shifted 0.1*"])
