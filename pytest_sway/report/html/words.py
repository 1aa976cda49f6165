"""Numbers and sentences of the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

_MINUS: Final = "\N{MINUS SIGN}"
_NAMED: Final = 3
"""How many failures the headline names."""


def signed(number: float | None) -> str:
    """Return a difference as `plain` does, with its sign."""
    return plain(number, sign="+")


def plain(number: float | None, sign: str = "-") -> str:
    """Return a number with three decimals, or with two significant digits if those would hide it."""
    if number is None:
        return "none"
    form = "#.2g" if 0.0 < abs(number) < 0.001 else ".3f"
    return f"{number + 0.0:{sign}{form}}".replace("-", _MINUS)  # + 0.0: not -0.0


def short(number: float) -> str:
    """Return a number with at most four significant digits."""
    return f"{number:.4g}".replace("-", _MINUS)


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.4g}%"


def typeset(text: str) -> str:
    """Return a text of the run record with minus signs instead of hyphens before numbers."""
    return text.replace(" -", f" {_MINUS}")


def probability(p: float | None) -> str:
    """Return a p-value as text."""
    if p is None:
        return "none"
    return "under 0.001" if p < 0.001 else f"{p:.3f}"


def times(count: int, noun: str) -> str:
    """Return a count and its noun, in the plural if the count is not 1."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def failed(comparison: Mapping[str, Any]) -> bool:
    """Return whether the comparison's test failed."""
    return bool(comparison["outcome"] == "failed")


def headline(comparisons: Sequence[Mapping[str, Any]], exit_status: int | None) -> tuple[str, str]:
    """Return the run's verdict as one sentence in two parts: the result, and its details."""
    lost = [each for each in comparisons if failed(each)]
    if not comparisons:
        return "Nothing was compared", ""
    if lost:
        told = f"{len(lost)} of {times(len(comparisons), 'comparison')} failed"
        if len(comparisons) == 1:
            told = "The comparison failed"
        return f"{told}: ", _listed(lost)
    told = "The comparison passed" if len(comparisons) == 1 else f"All {len(comparisons)} comparisons passed"
    if any(each["outcome"] != "passed" for each in comparisons):  # skipped, or expected to fail
        told = "No comparison failed"
    return told, "" if exit_status in (0, None) else f", but the run failed with exit status {exit_status}"


def _listed(lost: Sequence[Mapping[str, Any]]) -> str:
    told = [
        f"\N{LEFT DOUBLE QUOTATION MARK}{each['name']}\N{RIGHT DOUBLE QUOTATION MARK} {_outcome(each)}"
        for each in lost[:_NAMED]
    ]
    if len(lost) > _NAMED:
        told.append(f"and {len(lost) - _NAMED} more")
    return "; ".join(told)


def _outcome(comparison: Mapping[str, Any]) -> str:
    verdict = (comparison["verdict"] or "").partition(",")[0]
    return f"is {verdict}" if verdict in ("refuted", "undecided") else "failed"


def findings(leaks: Iterable[str], mutations: Iterable[str]) -> str:
    """Return the numbers of leaks and mutations as text; empty if there are none."""
    counted = [(len(list(leaks)), "leak"), (len(list(mutations)), "mutation")]
    return " and ".join(times(count, noun) for count, noun in counted if count)
