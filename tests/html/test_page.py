"""The page for a person: on screens of several sizes, by keyboard and screen reader, and with hostile texts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from pytest_sway.report.html.page import page
from tests.html.conftest import Opened
from tests.unit.report.run_records import comparison, record, varied, with_text

Open = Callable[..., Opened]

ATTACKS = (
    "<script>pwned=1</script><img src=x onerror=pwned=1>",
    "</style></title></textarea></svg></script --><svg onload=pwned=1>",
    "\" autofocus onfocus=pwned=1 x='",
    "' onmouseover=pwned=1 \u202e &lt;b&gt; {{ 7 * 7 }} \ud800 \x00",
)


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return varied()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_browser_reports_no_problem_and_makes_no_request(opened: Open, run: dict[str, Any], scheme: str) -> None:
    shown = opened(run, scheme=scheme)
    shown.open_all()
    assert shown.said == []
    assert [url.partition("://")[0] for url in shown.asked] == ["file"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_text_that_looks_like_html_is_shown_and_does_nothing(opened: Open, attack: str) -> None:
    counted = "[...document.querySelectorAll('*')].map(each => each.tagName + each.attributes.length).join()"
    harmless, hostile = opened(with_text("a text")), opened(with_text(attack))
    assert hostile.tab.evaluate(counted) == harmless.tab.evaluate(counted)
    assert hostile.tab.evaluate("typeof pwned") == "undefined"
    assert hostile.said == []
    plain = attack.replace("\ud800", "?").replace("\x00", "\ufffd")
    assert plain in hostile.tab.evaluate("document.body.textContent")
    assert plain in hostile.tab.evaluate("document.querySelector('svg.lane title').textContent")


def test_no_script_would_run_if_one_were_there(opened: Open, run: dict[str, Any]) -> None:
    with_script = page(run).replace("<main>", "<main><script>pwned=1</script><p id=x style='color:red' onclick=1>")
    shown = opened(with_script)
    assert shown.tab.evaluate("typeof pwned") == "undefined"
    assert shown.tab.evaluate("getComputedStyle(document.getElementById('x')).color") != "rgb(255, 0, 0)"
    assert {said.split()[1] for said in shown.said} == {"inline"}
    assert all("Content Security Policy" in said for said in shown.said)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360)])
def test_axe_finds_no_fault(opened: Open, scheme: str, width: int) -> None:
    failed = comparison(1, rows=6, claim=(-0.1, "refuted"), length=(3, 8))
    passed = comparison(2, rows=6, length=(3, 8), unit="points", drift=0.01)
    shown = opened(record([failed, passed], leaks=["a leak"], mutations=["a mutation"]), scheme=scheme, width=width)
    shown.open_all()
    found = Axe().run(shown.tab)
    assert found.violations_count == 0, found.generate_report()


def test_tab_reaches_each_summary_and_link_and_shows_the_focus(opened: Open) -> None:
    shown = opened(record([comparison(at, rows=4) for at in range(2)], leaks=["a leak"]))
    shown.open_all()
    wanted = shown.tab.evaluate(
        "[...document.querySelectorAll('a, summary')].map((each, at) => {each.dataset.at = at; return String(at)})"
    )
    assert len(wanted) == 2 * (1 + 1 + 4 + 1) + 1
    for each in wanted:
        shown.tab.keyboard.press("Tab")
        at, outline = shown.tab.evaluate(
            "[document.activeElement.dataset.at, getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert (at, outline) == (each, "solid")


def test_enter_opens_a_closed_comparison(opened: Open, run: dict[str, Any]) -> None:
    tab = opened(run).tab
    tab.locator("details.comparison:not([open]) > summary").first.focus()
    closed = tab.locator("details.comparison:not([open])").count()
    tab.keyboard.press("Enter")
    assert tab.locator("details.comparison:not([open])").count() == closed - 1


def test_a_link_to_a_comparison_opens_it(opened: Open, run: dict[str, Any]) -> None:
    tab = opened(run).tab
    place = tab.locator(".body", has_text="test_comparison[2]")
    assert not place.is_visible()
    tab.get_by_role("link", name="stories").click()
    place.wait_for(state="visible")


def test_dark_and_light_are_two_designs(opened: Open, run: dict[str, Any]) -> None:
    light, dark = (opened(run, scheme=scheme) for scheme in ("light", "dark"))
    assert light.tab.screenshot() != dark.tab.screenshot()
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => a + +b, 0)"
    assert light.tab.evaluate(brightness) > 700
    assert dark.tab.evaluate(brightness) < 150


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_is_no_wider_than_the_screen(opened: Open, run: dict[str, Any], width: int) -> None:
    endless = with_text("W" * 200)
    for each in (run, endless):
        shown = opened(each, width=width)
        shown.open_all()
        assert shown.tab.evaluate("document.documentElement.scrollWidth") <= width


def test_headings_skip_no_level(opened: Open, run: dict[str, Any]) -> None:
    shown = opened(run)
    levels = shown.tab.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(each => +each.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_each_chart_has_a_title_and_each_table_has_headers(opened: Open, run: dict[str, Any]) -> None:
    tab = opened(run).tab
    assert tab.locator("svg:not(svg svg):not([aria-hidden=true]):not(:has(> title))").count() == 0
    assert tab.locator("svg[role=img] > title").count() > 5
    assert tab.locator("table:not(:has(thead th[scope=col]))").count() == 0
    assert tab.locator("th:not([scope])").count() == 0


def test_a_screen_reader_hears_a_table_of_comparisons(opened: Open, run: dict[str, Any]) -> None:
    for width in (1280, 360):  # on a phone, rows are stacked and stay rows
        tab = opened(run, width=width).tab
        row = tab.get_by_role("row").filter(has=tab.get_by_role("rowheader", name="everyday texts"))
        assert row.get_by_role("cell").count() == 6
        assert row.get_by_role("cell", name="failed over \N{MINUS SIGN}0.1: refuted").count() == 1


def test_changes_are_marked_by_lines_and_not_only_by_colour(opened: Open, run: dict[str, Any]) -> None:
    tab = opened(run).tab
    found = tab.evaluate("""Object.fromEntries(["w1", "w2", "w3", "b1", "b2", "b3"].map(level => {
        const style = getComputedStyle(document.querySelector("i." + level));
        return [level, [style.textDecorationLine, style.textDecorationThickness]];
    }))""")
    assert len({tuple(look) for look in found.values()}) == 6
    assert {line for level, (line, _) in found.items() if level[0] == "w"} == {"underline"}
    assert {line for level, (line, _) in found.items() if level[0] == "b"} == {"overline"}


def test_a_run_without_comparisons_has_a_page(opened: Open) -> None:
    tab = opened(record()).tab
    assert tab.locator("h1").inner_text() == "Nothing was compared"
    assert Axe().run(tab).violations_count == 0


def test_a_comparison_of_two_has_a_page(opened: Open) -> None:
    tab = opened(record([comparison(rows=2)])).tab
    assert tab.locator("h1").inner_text() == "The comparison passed"
