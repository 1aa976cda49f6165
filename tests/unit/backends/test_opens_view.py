"""What a test gets from ``backend.as_base()``: a context manager that opens a view once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_sway.backends.contract import opens_view
from pytest_sway.errors import NoAdapterError


class Backend:
    def __init__(self) -> None:
        self.events: list[str] = []

    @opens_view
    def as_base(self) -> Iterator[str]:
        self.events.append("opened")
        try:
            yield "view"
        finally:
            self.events.append("closed")

    @opens_view
    def as_finetuned(self) -> Iterator[str]:
        raise NoAdapterError("there is none")
        yield "view"


def test_a_view_is_open_in_its_block_only() -> None:
    backend = Backend()
    opening = backend.as_base()
    assert backend.events == []
    with pytest.raises(ZeroDivisionError), opening:
        _ = 1 / 0
    assert backend.events == ["opened", "closed"]
    with backend.as_base() as view:
        assert (view, backend.events[2:]) == ("view", ["opened"])
    assert backend.events[2:] == ["opened", "closed"]


def test_an_error_while_a_view_opens_leads_to_no_code_of_the_standard_library() -> None:
    with pytest.raises(NoAdapterError) as caught, Backend().as_finetuned():
        pass
    assert {Path(entry.path).name for entry in caught.traceback} == {"test_opens_view.py", "contract.py"}


def test_a_view_is_opened_once() -> None:
    opening = Backend().as_base()
    with opening:
        pass
    with pytest.raises(RuntimeError, match=r"as_base\(\) was entered before: call it again"), opening:
        pass
