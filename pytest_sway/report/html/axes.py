"""The axis of a chart, in percent of its width, and the bars of sorted differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

_INSET: Final = 5.0
"""The margin on each side, in percent of the width, so that labels fit."""
_TICKS: Final = 5
_STEPS: Final = (1.0, 2.0, 5.0, 10.0)
_FEW: Final = 60
"""The largest number of bars that have gaps between them."""
_TALL: Final = 1000
"""The height of a shape in units, so that its coordinates are whole and short."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis.

    Attributes:
        low: The smallest value.
        high: The largest value.
        ticks: Round values between them.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Self:
        """Return the axis that covers all values and zero."""
        known = [0.0, *(value for value in values if value is not None and math.isfinite(value))]
        low, high = min(known), max(known)
        if low == high:
            low, high = low - 1.0, high + 1.0
        step = _step(high - low)
        ticks = range(math.ceil(low / step), math.floor(high / step) + 1)
        return cls(low, high, tuple(round(at * step, 12) for at in ticks))

    def at(self, value: float | None) -> float:
        """Return a value's position in percent; a value that is not finite stands at zero."""
        known = value if value is not None and math.isfinite(value) else 0.0
        share = (known - self.low) / (self.high - self.low)
        return round(_INSET + min(max(share, 0.0), 1.0) * (100 - 2 * _INSET), 2)


def _step(span: float) -> float:
    unit = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(unit * step for step in _STEPS if span / (unit * step) <= _TICKS)


@dataclass(frozen=True, slots=True)
class Bars:
    """Sorted differences as two shapes, losses and gains, in a box of ``width`` times `_TALL` units.

    Attributes:
        width: The number of bars.
        lost: The path of the bars below zero.
        gained: The path of the bars above zero.
        zero: The height of the zero line.
        mean: The height of the mean line.
    """

    width: int
    lost: str
    gained: str
    zero: int
    mean: int

    @classmethod
    def of(cls, differences: Sequence[float], mean: float | None) -> Self:
        """Return the bars of sorted differences, and their mean."""
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
    """Yield the path of one bar of width 1 for each top; without gaps, the bars form one silhouette."""
    if tops:
        yield f"M{tops[0][0]} {zero}"
        yield from (f"V{top}h.8V{zero}h.2" if gap else f"V{top}h1" for _, top in tops)
        yield f"V{zero}z"
