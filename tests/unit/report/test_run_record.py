"""The run record, from plain values, and its Markdown."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from pytest_sway.cache.stats import BackendStats, Event, EventLog, SwayStats, WorkerReport
from pytest_sway.report.comparisons import Collected, table_lines
from pytest_sway.report.files import append_text, write_json
from pytest_sway.report.markdown import escaped, markdown
from pytest_sway.report.run_record import Run, run_record

NUMBERS = {
    "name": "town",
    "candidate": "new",
    "baseline": "old",
    "unit": "points",
    "mean": 0.5,
    "low": 0.1,
    "high": 0.9,
    "n": 12,
    "confidence": 0.99,
    "detectable": 0.6,
    "p": 0.001,
    "against_0": "over 0: shown",
}
ROWS = [{"question": ["a", " b"], "candidate": 1.0, "baseline": 0.5}]


class Report:
    """The used attributes of a test report."""

    def __init__(self, when: str, *numbers: dict[str, Any], test: str = "t.py::a", **others: Any) -> None:
        self.nodeid = test
        self.when = when
        self.outcome = "passed"
        self.user_properties = [("sway_compare", json.dumps({**NUMBERS, **each})) for each in numbers]
        vars(self).update(others)

    @property
    def failed(self) -> bool:
        return self.outcome == "failed"


def collected(*reports: Report, each: bool = False) -> list[dict[str, Any]]:
    found = Collected(each=each)
    for report in reports:
        found.pytest_runtest_logreport(report)  # type: ignore[arg-type] # only these attributes are used
    return found.comparisons()


def record(**values: Any) -> dict[str, Any]:
    return run_record(
        Run(0.0, 1.0, 0, ["tests"]),
        **{"comparisons": [], "workers": [], "distributed": False, "named": {}, "versions": {}, **values},
    )


# --- test reports -----------------------------------------------------------------------------------------------------


def test_only_the_last_try_of_a_test_counts() -> None:
    rows = json.dumps([ROWS, ROWS])
    found = collected(
        Report("setup"),
        Report("call", {"name": "one"}, {"name": "two"}, outcome="rerun", sway_rows=rows),
        Report("setup"),
        Report("call", {"name": "three"}, sway_rows=json.dumps([ROWS])),
        Report("teardown", {"name": "three"}),
    )
    assert [(each["name"], each["outcome"], each["rows"]) for each in found] == [("three", "passed", ROWS)]


def test_a_try_before_an_interrupted_rerun_counts_as_failed() -> None:
    (found,) = collected(Report("setup"), Report("call", {}, outcome="rerun"))
    assert found["outcome"] == "failed"


def test_a_test_has_failed_if_a_subtest_failed_before_its_first_comparison() -> None:
    (found,) = collected(Report("setup"), Report("call", outcome="failed"), Report("call", {}))
    assert found["outcome"] == "failed"


@pytest.mark.parametrize("last", [Report("teardown", {}, outcome="failed"), Report("???", outcome="failed")])
def test_comparisons_are_kept_if_the_test_fails_later(last: Report) -> None:
    """If a worker is killed, its test's last report has no comparisons and the phase ``???``."""
    (found,) = collected(Report("setup"), Report("call", {}, sway_rows=json.dumps([ROWS])), last)
    assert (found["outcome"], found["rows"]) == ("failed", ROWS)


def test_rows_of_a_fixtures_comparison_come_before_those_of_the_test() -> None:
    other = [{**ROWS[0], "question": "other"}]
    found = collected(
        Report("setup", {"name": "fixture"}, sway_rows=json.dumps([ROWS])),
        Report("call", {"name": "fixture"}, {"name": "test"}, sway_rows=json.dumps([other])),
    )
    assert [(each["name"], each["rows"]) for each in found] == [("fixture", ROWS), ("test", other)]


def test_the_order_is_that_of_the_tests_whichever_worker_was_faster() -> None:
    reports = [Report("call", {}, test=f"t.py::{name}") for name in "cab"]
    assert [each["test"] for each in collected(*reports)] == ["t.py::a", "t.py::b", "t.py::c"]


def test_workers_that_all_run_a_test_have_a_comparison_each() -> None:
    reports = [Report("call", {}, worker_id=name) for name in ("gw1", "gw0")]
    assert [each["test"] for each in collected(*reports, each=True)] == ["[gw0] t.py::a", "[gw1] t.py::a"]
    assert len(collected(*reports)) == 1


def test_p_is_adjusted_over_the_run() -> None:
    found = collected(*(Report("call", {"p": p}, test=f"t.py::{p}") for p in (0.01, 0.02, 0.9)))
    assert [each["p_holm"] for each in found] == pytest.approx([0.03, 0.04, 0.9])


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_process_has_its_events_in_seconds_since_the_start() -> None:
    log = EventLog([Event(103.5, "load", "a", seconds=0.25, nbytes=8, resident=8), Event(104.0, "hit", "a", 3)], 2)
    made = run_record(
        Run(100.0, 5.0, 1, []),
        [],
        [WorkerReport("gw0", SwayStats(log=log, leaks=["l"])), WorkerReport("gw1", None, "crashed (x)")],
        distributed=True,
        named={},
        versions={},
    )
    assert made["workers"]["gw0"] == {
        "error": None,
        "events": [
            {"at": 3.5, "event": "load", "spec": "a", "count": 1, "seconds": 0.25, "bytes": 8, "resident_bytes": 8},
            {
                "at": 4.0,
                "event": "hit",
                "spec": "a",
                "count": 3,
                "seconds": None,
                "bytes": None,
                "resident_bytes": None,
            },
        ],
        "left_out": 2,
    }
    assert made["workers"]["gw1"] == {"error": "crashed (x)", "events": [], "left_out": 0}
    assert (made["run"]["workers"], made["leaks"]) == (2, ["gw0: l"])
    assert made["run"]["started"] == "1970-01-01T00:01:40Z"


def test_a_used_spec_has_its_loaded_fields_and_others_have_the_configured_ones() -> None:
    stats = SwayStats(specs={"new": {"fields": {"base": "b", "device": "cpu"}, "digest": "d"}})
    made = record(workers=[WorkerReport("main", stats)], named={"new": {"base": "b"}, "old": {"base": "c"}})
    assert made["specs"] == {
        "new": {"fields": {"base": "b", "device": "cpu"}, "digest": "d"},
        "old": {"fields": {"base": "c"}, "digest": None},
    }


def test_no_secret_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hf_secretsecret")
    comparison = {**NUMBERS, "rows": [{"question": ["hf_secretsecret", " b"], "candidate": 0.0, "baseline": 0.0}]}
    stats = SwayStats(leaks=["held by hf_secretsecret"])
    named = {"new": {"base": "https://me:password@host/x"}}
    made = record(comparisons=[comparison], workers=[WorkerReport("main", stats)], named=named)
    assert "secretsecret" not in json.dumps(made)
    assert "password" not in json.dumps(made)


def test_values_that_json_cannot_hold_are_null_or_text(tmp_path: Path) -> None:
    made = record(comparisons=[{**NUMBERS, "high": math.inf}], named={"new": {"since": Path("x"), "timeout": math.nan}})
    write_json(made, tmp_path / "r.json")
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["comparisons"][0]["high"] is None
    assert again["specs"]["new"]["fields"] == {"since": "x", "timeout": None}


# --- the log of events ------------------------------------------------------------------------------------------------


def test_hits_without_another_event_between_them_are_one_event() -> None:
    log, backends = EventLog(), {"a": BackendStats(hits=2)}
    log.note_hits(backends)
    backends["a"].hits = 5
    log.note_hits(backends)
    log.note_hits(backends)
    log.note("evict", "a")
    backends["a"].hits = 6
    log.note_hits(backends)
    assert [(event.event, event.times) for event in log.events] == [("hit", 5), ("evict", 1), ("hit", 1)]


def test_the_log_is_bounded_and_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_sway.cache.stats._MOST_EVENTS", 3)
    log = EventLog()
    for _ in range(5):
        log.note("load", "a")
    log.note_hits({"b": BackendStats(hits=1)})
    assert (len(log.events), log.left_out) == (3, 3)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_to_its_end_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"schema": math.nan}, path)
    with pytest.raises(IsADirectoryError):
        write_json({}, tmp_path)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_json({"schema": 1}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text()) == {"schema": 1}


def test_text_is_appended_whatever_it_holds(tmp_path: Path) -> None:
    append_text("one\n", tmp_path / "s.md")
    append_text("two \ud800\n", tmp_path / "s.md")
    assert (tmp_path / "s.md").read_text() == "one\ntwo \\ud800\n"


def test_appended_text_begins_on_a_new_line(tmp_path: Path) -> None:
    (tmp_path / "s.md").write_text("an unfinished line")
    append_text("## title\n", tmp_path / "s.md")
    assert (tmp_path / "s.md").read_text() == "an unfinished line\n## title\n"


# --- tables -----------------------------------------------------------------------------------------------------------

HOSTILE = "a | b `code` <script>alert(1)</script>\n\n# title [x](https://e.vil) **bold** \\| &amp; $x$"


def comparison(**values: Any) -> dict[str, Any]:
    return {**NUMBERS, "test": "t.py::a", "outcome": "passed", "claim": None, "p_holm": 0.002, "rows": ROWS, **values}


def test_a_table_in_markdown_ends_before_it_is_too_long_to_show() -> None:
    text = markdown({"comparisons": [comparison(test=f"t.py::{n}", rows=[]) for n in range(503)]})
    assert "\n3 more comparisons are left out.\n" in text
    assert text.count("t.py::") in (0, 500)


def test_markdown_has_the_failures_first_and_the_ten_worst_texts_of_each() -> None:
    rows = [{"question": f"text {n}", "candidate": float(n), "baseline": 0.0} for n in range(15)]
    failed = comparison(name="bad", outcome="failed", claim="over 1", verdict="refuted", rows=rows[::-1])
    lines = markdown({"comparisons": [comparison(), failed]}).splitlines()
    assert lines[2] == "| comparison | outcome | prompts | mean | low | high | p | unit | shown |"
    assert lines[4] == "| bad | failed | 12 | +0.5 | +0.1 | +0.9 | 0.002 | points | over 1&#58; refuted |"
    assert lines[5] == "| town | passed | 12 | +0.5 | +0.1 | +0.9 | 0.002 | points | over 0&#58; shown |"
    assert [line for line in lines if line.startswith("### ")] == ["### bad"]
    assert [line.split(" | ")[-1] for line in lines if "text" in line] == [f"text {n} |" for n in range(10)]


def test_texts_have_no_meaning_in_markdown() -> None:
    hostile = comparison(
        name=HOSTILE,
        candidate=HOSTILE,
        outcome="failed",
        rows=[{"question": [HOSTILE, HOSTILE], "candidate": 0.0, "baseline": 1.0}],
    )
    shown = markdown({"comparisons": [hostile]})
    assert "<" not in shown
    assert not re.search(r"[`*\\\[\]$]", shown)
    assert {line.count("|") for line in shown.splitlines() if line.startswith("|")} == {10, 5}
    assert "https:" not in shown
    assert len([line for line in shown.splitlines() if line.startswith("#")]) == 2


def test_escaped_text_reads_as_it_was_written() -> None:
    assert html.unescape(escaped(HOSTILE)) == " ".join(HOSTILE.split())


def test_a_name_in_a_text_is_no_mention() -> None:
    shown = html.unescape(escaped("ask @octocat"))
    assert "@octocat" not in shown
    assert shown.replace("\N{WORD JOINER}", "") == "ask @octocat"


def test_a_long_text_is_cut() -> None:
    failed = comparison(outcome="failed", rows=[{"question": "x" * 9_999, "candidate": 0.0, "baseline": 0.0}])
    assert len(markdown({"comparisons": [failed]})) < 2_000


def test_a_summary_too_long_for_github_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_sway.report.markdown._MOST", 1_500)
    text = markdown({"comparisons": [comparison(outcome="failed", name=f"bad {n}") for n in range(9)]})
    assert text.endswith("The worst texts of the other failures are left out, because the summary is too long.\n")
    assert text.count("### ") in range(1, 9)


def test_a_run_without_comparisons_says_so() -> None:
    assert "No test of this run called `sway_compare`." in markdown(record())


def test_comparisons_of_one_name_are_told_apart_by_their_tests() -> None:
    tests = ("a/t.py::test_a[1]", "a/t.py::test_b", "a/t.py::test_a[1]")
    found = [line.split("  ")[0] for line in table_lines([comparison(test=test) for test in tests])]
    assert found[1:4] == ["town (test_a[1])", "town (test_b)", "town (test_a[1])"]
    found = [line.split("  ")[0] for line in table_lines([comparison(test=f"{at}/t.py::test_a") for at in "ab"])]
    assert found[1:3] == ["town (a/t.py::test_a)", "town (b/t.py::test_a)"]


def test_markdown_has_no_control_characters() -> None:
    assert escaped("\x1b[31m \0 \ud800") == "&#92;x1b&#91;31m &#92;x00 &#92;ud800"


def test_the_terminals_table_says_which_margin_a_verdict_is_about() -> None:
    known = comparison(claim="over 1", verdict="undecided, needs about 30 prompts", outcome="failed")
    assert list(table_lines([known]))[1:] == [
        "town        failed        12  +0.5  +0.1  +0.9  0.002  points  over 1: undecided, needs about 30 prompts",
        "low to high: 99% confidence interval of the mean; p: p-value of no difference",
    ]
    assert list(table_lines([known, comparison(confidence=0.95)]))[2:] == [
        "town        passed        12  +0.5  +0.1  +0.9  0.002  points  over 0: shown",
        "low to high: 95% or 99% confidence interval of the mean; p: p-value of no difference (Holm, 2 comparisons)",
        "shown: the verdict on the asserted margin, or on 0 if the margin is not known",
    ]
