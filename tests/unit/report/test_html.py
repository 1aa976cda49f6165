"""The page without a browser: its size, speed, escaping and layout."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest

from pytest_sway.report.html.axes import Axis, Bars
from pytest_sway.report.html.page import page
from pytest_sway.report.html.texts import brief, runs
from pytest_sway.report.html.timeline import workers
from pytest_sway.report.html.words import headline, plain, signed
from tests.unit.report.run_records import CLAIMS, comparison, event, record, with_text


class Elements(HTMLParser):
    """A page's elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_of_50_comparisons_of_200_texts_takes_under_2_mb_and_2_seconds() -> None:
    full = record([comparison(at, rows=200, claim=CLAIMS[at % 3]) for at in range(50)])
    started = time.process_time()
    made = page(full)
    assert time.process_time() - started < 2.0
    assert len(made.encode()) < 2_000_000


def test_the_size_of_a_page_is_bounded() -> None:
    many, long = comparison(rows=12_000, length=(3, 4)), comparison(rows=10, length=(2_000, 2_001))
    assert len(page(record([many])).encode()) < 1_200_000
    made = page(record([long]))
    assert len(made.encode()) < 400_000
    assert " … 1600 more tokens" in made


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "</style>&amp;"])
def test_every_value_of_a_record_is_escaped(text: str) -> None:
    same = "a" * len(text)
    harmless, hostile = Elements(page(with_text(same))), Elements(page(with_text(text)))
    assert [(tag, sorted(attrs)) for tag, attrs in hostile.found] == [
        (tag, sorted(attrs)) for tag, attrs in harmless.found
    ]
    assert hostile.text.count(text) == harmless.text.count(same) > 20


def test_a_page_has_no_script_and_makes_no_request() -> None:
    found = Elements(page(record([comparison(at, claim=CLAIMS[at]) for at in range(3)]))).found
    assert {tag for tag, _ in found}.isdisjoint({"script", "link", "img", "iframe", "form", "object", "base"})
    names = {name for _, attrs in found for name in attrs}
    assert not {name for name in names if name.startswith("on") or name in ("style", "src", "srcset", "action")}
    assert all(str(attrs["href"]).startswith("#") for tag, attrs in found if tag == "a")
    (policy,) = (attrs["content"] for _, attrs in found if attrs.get("http-equiv"))
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-\S{44}'; base-uri 'none'; form-action 'none'", str(policy)
    )


def test_lone_surrogates_and_nul_are_replaced() -> None:
    made = page(with_text("a\ud800b\x00c"))
    assert made.encode().decode() == made
    assert "a?b\N{REPLACEMENT CHARACTER}c" in made


@pytest.mark.parametrize(
    ("verdicts", "status", "told"),
    [
        ([], 0, "Nothing was compared"),
        ([None], 0, "The comparison passed"),
        ([None, None], 0, "All 2 comparisons passed"),
        ([None], 1, "The comparison passed, but the run failed with exit status 1"),
        (["refuted"], 1, "The comparison failed: “0” is refuted"),
        (["refuted", None], 1, "1 of 2 comparisons failed: “0” is refuted"),
        (["undecided, needs about 9 prompts", "shown"], 1, "2 of 2 comparisons failed: “0” is undecided; “1” failed"),
        (["refuted"] * 5, 1, "5 of 5 comparisons failed: “0” is refuted; “1” is refuted; “2” is refuted; and 2 more"),
    ],
)
def test_the_headline_is_the_runs_verdict(verdicts: list[str | None], status: int, told: str) -> None:
    made = [comparison(at, rows=2, claim=(0.0, verdict), name=str(at)) for at, verdict in enumerate(verdicts)]
    assert "".join(headline(made, status)) == told


def test_the_headline_counts_no_skipped_comparison_as_passed() -> None:
    made = [comparison(0, rows=2), {**comparison(1, rows=2), "outcome": "skipped"}]
    assert headline(made, 0) == ("No comparison failed", "")


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0.0, "+0.000"),
        (-0.0, "+0.000"),
        (-1.23456, "-1.235"),
        (0.001, "+0.001"),
        (-0.00099, "-0.00099"),
        (0.0001, "+0.00010"),
        (-1.234e-7, "-1.2e-07"),
    ],
)
def test_a_tiny_difference_does_not_read_as_none(number: float, shown: str) -> None:
    typeset = shown.replace("-", "\N{MINUS SIGN}")
    assert signed(number) == typeset
    assert plain(number) == typeset.removeprefix("+")
    assert signed(None) == plain(None) == "none"


def test_failures_come_first() -> None:
    made = [comparison(at, claim=CLAIMS[at], unit=unit) for at, unit in ((2, "points"), (0, "nats"))]
    found = re.findall(r'<a href="#c\d+">([^<]+)', page(record(made)))
    assert found == ["comparison 0", "comparison 2"]


def test_comparisons_of_one_name_are_told_apart_by_their_tests() -> None:
    shown = page(record([comparison(at, name="new against old") for at in (1, 2)]))
    assert re.findall(r'<a href="#c\d+">([^<]+)', shown) == [
        "new against old (test_comparison[1])",
        "new against old (test_comparison[2])",
    ]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([], (-1.0, -0.5, 0.0, 0.5, 1.0)),
        ([0.0, None, float("nan")], (-1.0, -0.5, 0.0, 0.5, 1.0)),
        ([-4.833, 1.355], (-4.0, -2.0, 0.0)),
        ([0.001, 0.0029], (0.0, 0.001, 0.002)),
        ([-1e6], (-1e6, -8e5, -6e5, -4e5, -2e5, 0.0)),
    ],
)
def test_an_axis_has_round_ticks_among_its_values_and_zero(values: Any, ticks: tuple[float, ...]) -> None:
    axis = Axis.over(values)
    assert axis.ticks == ticks
    assert (axis.at(axis.low), axis.at(axis.high)) == (5.0, 95.0)
    assert axis.at(None) == axis.at(0.0)


def test_bars_stand_on_zero_and_reach_to_their_values() -> None:
    bars = Bars.of([-3.0, -1.0, 0.0, 1.0], mean=-0.75)
    assert (bars.zero, bars.mean) == (250, 438)
    assert bars.lost == "M0 250V1000h.8V250h.2V500h.8V250h.2V250z"
    assert bars.gained == "M3 250V0h.8V250h.2V250z"
    assert Bars.of([0.0, 0.0], mean=0.0).lost == ""
    assert Bars.of([-1.0] * 61, mean=-1.0).lost.count("h1") == 61


def test_tokens_are_marked_by_how_much_more_or_less_probable_they_are() -> None:
    tokens = {
        "text": list("abcdefg"),
        "candidate": [-1.0, -1.0, -1.2, -2.0, -4.0, -0.2, None],
        "baseline": [-1.0, -1.05, -1.0, -1.0, -1.0, -3.0, -1.0],
        "base": None,
    }
    marked = [(run.level, run.text) for run in runs(tokens, "candidate", "baseline")]
    assert marked == [("", "ab"), ("w1", "c"), ("w2", "d"), ("w3", "e"), ("b3", "f"), ("", "g")]
    assert runs(tokens, "candidate", "base") == []


def test_a_long_question_is_cut_in_the_middle() -> None:
    assert brief(["The mayor\nof Quillmere", " is  Odalys"]) == "The mayor of Quill…is Odalys"
    assert brief("a short one") == "a short one"


def test_a_lane_shows_loads_stays_and_the_end() -> None:
    events = [
        event(2.0, "load", "a", seconds=1.5, resident_bytes=2048),
        event(3.0, "hit", "a", count=4),
        event(5.0, "evict", "a", resident_bytes=2048),
        event(5.5, "close", "a", resident_bytes=0),
        event(6.0, "failure", "b"),
        event(8.0, "load", "a", seconds=1.0, resident_bytes=1024),
    ]
    made = record(workers={"main": {"error": None, "events": events, "left_out": 3}})
    axis, (worker,) = workers(made | {"run": {"seconds": 9.0}})
    first, second = worker.lanes
    assert (first.loads, first.stays) == ([(0.5, 2.0), (7.0, 8.0)], [(2.0, 5.5), (8.0, 9.0)])
    assert first.told() == "a: loaded at 0.5 s, 7.0 s, evicted at 5.0 s, 4 hits"
    assert second.told() == "b: failed to load at 6.0 s"
    assert (worker.peak, worker.notes) == ("2.0 KiB", ["3 later events left out"])
    assert (
        worker.memory
        == "M5.0 100"
        + "".join(f"H{axis.at(at)}V{height}" for at, height in ((2, 0), (5, 0), (5.5, 100), (8, 50), (9, 100)))
        + "z"
    )
