"""Pages in the system's Chromium, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pytest_sway.report.html.page import page

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Opened:
    """A page in the browser, with its messages and requests.

    Attributes:
        tab: The page.
        said: Console messages and page errors.
        asked: The requested addresses.
    """

    tab: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def open_all(self) -> None:
        """Open every ``<details>``."""
        self.tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found is not None, f"none of {', '.join(NAMES)} is installed; see CONTRIBUTING.md"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Open the page of a record, or a page's text."""
    contexts = []

    def _open(record: dict[str, Any] | str, *, scheme: Any = "light", width: int = 1280) -> Opened:
        file = tmp_path / "sway.html"
        file.write_text(record if isinstance(record, str) else page(record), "utf-8")
        contexts.append(browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}))
        opened = Opened(contexts[-1].new_page())
        opened.tab.on("console", lambda message: opened.said.append(message.text))
        opened.tab.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.tab.on("request", lambda request: opened.asked.append(request.url))
        opened.tab.goto(file.as_uri())
        return opened

    yield _open
    for context in contexts:
        context.close()
