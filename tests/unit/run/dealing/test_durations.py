"""The seconds of tests and loads: in pytest's cache, and estimated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sway.run.dealing.durations import Estimates, Remembered


class Cache:
    """pytest's cache, in memory."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def get(self, key: str, default: object) -> Any:
        assert key == "sway/durations"
        return default if self.value is None else self.value

    def set(self, key: str, value: object) -> None:
        assert key == "sway/durations"
        self.value = value


def config_with(cache: Cache | None) -> Any:
    return SimpleNamespace() if cache is None else SimpleNamespace(cache=cache)


def test_what_was_written_is_read() -> None:
    cache = Cache()
    Remembered({"test_x.py::test_1": 1.5}, {"a": 20.0}).write(config_with(cache))
    assert Remembered.read(config_with(cache)) == ({"test_x.py::test_1": 1.5}, {"a": 20.0})


@pytest.mark.parametrize("cache", [None, Cache()], ids=["switched off", "empty"])
def test_without_earlier_runs_nothing_is_known(cache: Cache | None) -> None:
    assert Remembered.read(config_with(cache)) == ({}, {})


def test_nothing_is_written_where_the_cache_is_switched_off() -> None:
    Remembered({"test_x.py::test_1": 1.0}, {}).write(config_with(None))


@pytest.mark.parametrize(
    "value",
    [
        7,
        [],
        {"tests": 7},
        {"tests": ["a"], "loads": None},
        {"tests": {"a": "1"}, "loads": {"b": [1.0]}},
        {"tests": {"a": -1.0, "b": float("nan")}, "loads": {"c": float("inf")}},
    ],
)
def test_a_damaged_cache_is_no_error(value: Any) -> None:
    assert Remembered.read(config_with(Cache(value))) == ({}, {})


def test_of_too_many_tests_the_last_are_kept() -> None:
    cache = Cache()
    Remembered({f"test_{number}": 1.0 for number in range(20_010)}, {}).write(config_with(cache))
    kept = Remembered.read(config_with(cache)).tests
    assert len(kept) == 20_000
    assert "test_9" not in kept
    assert "test_20009" in kept


def test_a_test_is_estimated_by_those_of_its_base_then_by_all_and_one_of_a_second() -> None:
    estimates = Estimates({})
    assert estimates.of_test("a") == 1.0
    estimates.note_test("a", 2.0)
    estimates.note_test("a", 6.0)
    assert estimates.of_test("a") == estimates.of_test("b") == 3.0
    estimates.note_test("b", 11.0)
    assert (estimates.of_test("a"), estimates.of_test("b"), estimates.of_test("c")) == (3.0, 6.0, 5.0)


def test_a_load_is_estimated_by_this_run_then_by_earlier_runs_then_by_other_bases() -> None:
    assert Estimates({}).of_load("a") == 0.0
    estimates = Estimates({"a": 8.0})
    assert estimates.of_load("a") == estimates.of_load("b") == 8.0
    estimates.note_load("a", 2.0)
    assert estimates.of_load("a") == 2.0
    assert estimates.of_load("b") == 5.0
    assert estimates.loads() == {"a": 2.0}
