"""How long tests and loads take: as measured in this run, else as known from earlier runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

if TYPE_CHECKING:
    import pytest

_KEY: Final = "sway/durations"
_MOST: Final = 20_000
"""The most tests, and the most bases, whose seconds are kept."""
_NO_DURATION: Final = 1e9
"""Seconds. Only a damaged file has as many, such as a number that no float can be."""


class Remembered(NamedTuple):
    """The seconds of earlier runs, in pytest's cache.

    Attributes:
        tests: Of each test, by its node id, without the load of its base.
        loads: Of a load of each base, by its digest, without imports.
    """

    tests: dict[str, float]
    loads: dict[str, float]

    @classmethod
    def read(cls, config: pytest.Config) -> Self:
        """Return what pytest's cache has; nothing if it is switched off or damaged."""
        cache = getattr(config, "cache", None)
        found = None if cache is None else cache.get(_KEY, None)
        values = found if isinstance(found, dict) else {}
        return cls(_seconds(values.get("tests")), _seconds(values.get("loads")))

    def write(self, config: pytest.Config) -> None:
        """Write these to pytest's cache; of too many, keep the last."""
        cache = getattr(config, "cache", None)
        if cache is not None:
            cache.set(_KEY, {"tests": _last(self.tests), "loads": _last(self.loads)})


def _seconds(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        return {}
    return {key: float(each) for key, each in values.items() if _is_duration(each)}


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < _NO_DURATION


def _last(values: Mapping[str, float]) -> dict[str, float]:
    return {key: round(seconds, 4) for key, seconds in list(values.items())[-_MOST:]}


class _Mean:
    def __init__(self) -> None:
        self._total = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        self._total += value
        self._count += 1

    def with_one_more(self, value: float) -> float:
        return (self._total + value) / (self._count + 1)

    @property
    def value(self) -> float | None:
        return self._total / self._count if self._count else None


class Estimates:
    """Estimates tests and loads that have not been measured.

    Args:
        loads: The seconds of loads in earlier runs, by base.
    """

    def __init__(self, loads: Mapping[str, float]) -> None:
        self._earlier = loads
        self._tests: dict[str | None, _Mean] = {}
        self._all_tests = _Mean()
        self._loads: dict[str, _Mean] = {}
        self._all_loads = _Mean()
        for seconds in loads.values():
            self._all_loads.add(seconds)

    def note_test(self, base: str | None, seconds: float) -> None:
        """Add a measured test of ``base``."""
        self._tests.setdefault(base, _Mean()).add(seconds)
        self._all_tests.add(seconds)

    def note_load(self, base: str, seconds: float) -> None:
        """Add a measured load of ``base``."""
        self._loads.setdefault(base, _Mean()).add(seconds)
        self._all_loads.add(seconds)

    def of_test(self, base: str | None) -> float:
        """Estimate a test of ``base``: the mean of this run's, else that of all tests.

        The mean counts one more test, of a second, since the first tests of a base may be far shorter than others.
        """
        return self._tests.get(base, self._all_tests).with_one_more(1.0)

    def of_load(self, base: str) -> float:
        """Estimate a load of ``base``: the mean of this run's, else of earlier runs, else of all bases, else 0."""
        measured = self._loads.get(base)
        seconds = self._earlier.get(base) if measured is None else measured.value
        return seconds if seconds is not None else self._all_loads.value or 0.0

    def loads(self) -> dict[str, float]:
        """Return the mean seconds of this run's loads, by base."""
        return {base: mean.value for base, mean in self._loads.items() if mean.value is not None}
