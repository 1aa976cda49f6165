"""Questions and their tokens as the page shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

_HEAD: Final = 18
_TAIL: Final = 9
_LONG: Final = 600
_MOST: Final = 4
"""How many tokens of a text stand in the table of tokens that changed most."""
_SHARES: Final = (math.log(1.1), math.log(2), math.log(10))
"""The least change of each strength, in nats: a tenth, twice and ten times more or less probable."""
_RETURN: Final = "\N{RETURN SYMBOL}\n"


class Run(NamedTuple):
    """Adjacent tokens with the same level of change: ``w1`` to ``w3`` for worse, ``b1`` to ``b3`` for better."""

    level: str
    text: str


class Token(NamedTuple):
    """One token's log-probabilities, in nats."""

    text: str
    base: float | None
    baseline: float | None
    candidate: float | None

    @property
    def difference(self) -> float | None:
        """Return the candidate's log-probability minus the baseline's."""
        return None if self.candidate is None or self.baseline is None else self.candidate - self.baseline


def brief(question: Any) -> str:
    """Return a question's beginning and end on one line."""
    text = " ".join("".join(parts(question)).split())
    if len(text) <= _HEAD + _TAIL + 1:
        return text
    return f"{text[:_HEAD]}\N{HORIZONTAL ELLIPSIS}{text[-_TAIL:]}"


def parts(question: Any) -> tuple[str, str]:
    """Return the prompt and the answer of a pair; for anything else, an empty prompt and its text."""
    if isinstance(question, list | tuple) and len(question) == 2 and isinstance(question[1], str):
        return str(question[0]), question[1]
    return "", str(question)


def clipped(text: str, *, from_end: bool = False) -> str:
    """Return a text's beginning, or its end, of bounded length."""
    if len(text) <= _LONG:
        return text
    return f"\N{HORIZONTAL ELLIPSIS}{text[-_LONG:]}" if from_end else f"{text[:_LONG]}\N{HORIZONTAL ELLIPSIS}"


def runs(tokens: Mapping[str, Any], new: str, old: str) -> list[Run]:
    """Return a text's tokens, grouped by how much more probable ``new`` finds them; none if a side is unknown."""
    if not tokens.get(new) or not tokens.get(old):
        return []
    levels = map(_level, tokens[new], tokens[old])
    levelled = list(zip(levels, tokens["text"], strict=False))
    return [
        Run(level, "".join(text for _, text in group).replace("\n", _RETURN))
        for level, group in groupby(levelled, key=lambda pair: pair[0])
    ]


def _level(new: float | None, old: float | None) -> str:
    if new is None or old is None:
        return ""
    strength = sum(abs(new - old) >= share for share in _SHARES)
    return f"{'b' if new > old else 'w'}{strength}" if strength else ""


def most_changed(tokens: Mapping[str, Any]) -> list[Token]:
    """Return the tokens that changed most, in the text's order."""
    found = list(_tokens(tokens))
    changed = sorted((at for at, each in enumerate(found) if each.difference), key=lambda at: -abs(_moved(found[at])))
    return [found[at] for at in sorted(changed[:_MOST])]


def _moved(token: Token) -> float:
    return token.difference or 0.0


def _tokens(tokens: Mapping[str, Any]) -> Iterator[Token]:
    texts: Sequence[str] = tokens.get("text") or ()
    sides = [tokens.get(side) or [None] * len(texts) for side in ("base", "baseline", "candidate")]
    for text, *numbers in zip(texts, *sides, strict=False):
        yield Token(text.replace("\n", _RETURN.strip()), *numbers)
