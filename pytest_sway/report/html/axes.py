"""Where the values of a chart stand, in percent of its width, and the shape of sorted differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

_INSET: Final = 5.0
"""Percent of the width that are left free on both sides, so that labels fit."""
_TICKS: Final = 5
_STEPS: Final = (1.0, 2.0, 5.0, 10.0)
_FEW: Final = 60
"""Up to how many bars there are gaps between them."""
_TALL: Final = 1000
"""Units of a shape's height, so that its coordinates are whole and short."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis.

    Attributes:
        low: Where it begins.
        high: Where it ends.
        ticks: Round numbers within.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Self:
        """The axis on which all values stand, and zero."""
        known = [0.0, *(value for value in values if value is not None and math.isfinite(value))]
        low, high = min(known), max(known)
        if low == high:
            low, high = low - 1.0, high + 1.0
        step = _step(high - low)
        ticks = range(math.ceil(low / step), math.floor(high / step) + 1)
        return cls(low, high, tuple(round(at * step, 12) for at in ticks))

    def at(self, value: float | None) -> float:
        """Where a value stands, in percent; what is on no axis stands at zero."""
        known = value if value is not None and math.isfinite(value) else 0.0
        share = (known - self.low) / (self.high - self.low)
        return round(_INSET + min(max(share, 0.0), 1.0) * (100 - 2 * _INSET), 2)


def _step(span: float) -> float:
    unit = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(unit * step for step in _STEPS if span / (unit * step) <= _TICKS)


@dataclass(frozen=True, slots=True)
class Bars:
    """Differences in order, as two shapes over ``width`` times `_TALL` units: what lost, and what gained.

    Attributes:
        width: How many bars there are.
        lost: The path of the bars below zero.
        gained: The path of those above.
        zero: Where zero stands.
        mean: Where the mean stands.
    """

    width: int
    lost: str
    gained: str
    zero: int
    mean: int

    @classmethod
    def of(cls, differences: Sequence[float], mean: float | None) -> Self:
        """The bars of sorted differences, and their mean."""
        top, bottom = max([0.0, *differences]), min([0.0, *differences])
        gap = len(differences) <= _FEW

        def y(value: float | None) -> int:
            return round(_TALL * (top - (value or 0.0)) / ((top - bottom) or 1.0))

        zero = y(0.0)
        return cls(
            len(differences),
            "".join(_bars([(at, y(each)) for at, each in enumerate(differences) if each < 0], zero, gap)),
            "".join(_bars([(at, y(each)) for at, each in enumerate(differences) if each > 0], zero, gap)),
            zero,
            y(mean),
        )


def _bars(tops: Sequence[tuple[int, int]], zero: int, gap: bool) -> Iterator[str]:
    """A bar of width 1 for each; without a gap, hundreds of them are one silhouette."""
    if tops:
        yield f"M{tops[0][0]} {zero}"
        yield from (f"V{top}h.8V{zero}h.2" if gap else f"V{top}h1" for _, top in tops)
        yield f"V{zero}z"
