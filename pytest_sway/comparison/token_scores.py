"""The log-probability of each token of the worst and best questions, for the page of ``--sway-html``.

This uses only the public methods of views. It serves reports, so nothing here fails a test: unknown values are
``None``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.questions import checked_pair
from pytest_sway.backends.text.tokens import encode, encode_pair
from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from pytest_sway.comparison.comparison import Row

__tracebackhide__ = True

EXTREMES: Final = 5
"""How many of the worst questions, and of the best, are asked again."""


class TokenScores(NamedTuple):
    """The tokens of a text, or of a pair's answer.

    Attributes:
        ids: The ids of the tokens.
        texts: The text that each token adds. Of several tokens for one character, only the last has a text.
        logprobs: Log-probabilities in nats; ``None`` for a value that is not finite.
    """

    ids: tuple[int, ...]
    texts: list[str]
    logprobs: list[float | None]


def extreme_rows(rows: Sequence[Row]) -> list[int]:
    """Return the positions of the worst and best rows."""
    ordered = sorted(range(len(rows)), key=lambda at: rows[at].difference)
    return [*ordered[:EXTREMES], *ordered[EXTREMES:][-EXTREMES:]]


def token_scores(view: Any, questions: Sequence[Any]) -> list[TokenScores | None]:
    """Return the tokens of each question on a view; ``None`` for those that it cannot give.

    Args:
        view: A view of any kind. The tokens' texts come from its ``tokenizer``, which kinds ``hf`` and ``mlx`` have.
        questions: Texts, pairs of a prompt and an answer, or anything.
    """
    try:
        tokenizer = view.tokenizer
        asked = [_asked(view, question) for question in questions]
        found: list[TokenScores | None] = [None] * len(asked)
        for prefix in (True, False):
            places = [at for at, each in enumerate(asked) if each is not None and each.prefix == prefix]
            texts = [each.text for each in asked if each is not None and each.prefix == prefix]
            rolled = view.rolling_logprobs(texts, prefix=prefix) if texts else []
            for at, each in zip(places, rolled, strict=True):
                found[at] = _told(tokenizer, asked[at], each)
    except Exception:  # of a view of the user's own, anything
        return [None] * len(questions)
    return found


def merged(
    candidate: Iterable[TokenScores | None],
    baseline: Iterable[TokenScores | None],
    base: Iterable[TokenScores | None],
) -> list[dict[str, Any] | None]:
    """Return, for each question, its tokens' texts and log-probabilities as the run record has them.

    A side that cuts the text into other tokens is ``None``. A question whose text contains a secret is ``None`` too:
    redaction would not find a secret that is cut into tokens.
    """
    return [_merged(*each) for each in zip(candidate, baseline, base, strict=True)]


def _merged(candidate: TokenScores | None, *others: TokenScores | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    text = "".join(candidate.texts)
    if redacted(text) != text:
        return None
    sides = [None if each is None or each.ids != candidate.ids else each.logprobs for each in others]
    return {
        "text": candidate.texts,
        "candidate": candidate.logprobs,
        **dict(zip(("baseline", "base"), sides, strict=True)),
    }


class _Asked(NamedTuple):
    """The text that a view is asked to score for a question.

    Attributes:
        text: The whole text.
        prefix: Whether to put a token before it.
        scored: The ids of the answer's tokens; ``None`` for all tokens.
    """

    text: str
    prefix: bool
    scored: tuple[int, ...] | None = None


def _asked(view: Any, question: Any) -> _Asked | None:
    if isinstance(question, str):
        return _Asked(question, prefix=True)
    if isinstance(question, Mapping) or not isinstance(question, Sequence):
        return None
    prompt, answer = checked_pair(question)
    given = prompt if isinstance(prompt, str) else str(view.render(prompt))
    window = encode_pair(view.tokenizer, given, answer, rendered=not isinstance(prompt, str))
    text, first = given + answer, view.tokenizer.bos_token
    if first and text.startswith(first) and tuple(encode(view.tokenizer, text)[:2]) == window.context[:1] * 2:
        text = text.removeprefix(first)  # the tokenizer adds it itself
    return _Asked(text, prefix=not given.strip(), scored=window.scored)


def _told(tokenizer: Any, asked: _Asked | None, rolled: Any) -> TokenScores | None:
    ids = tuple(map(int, rolled.token_ids))
    scored = ids[1:] if asked is None or asked.scored is None else asked.scored
    if not scored or len(scored) >= len(ids) or ids[-len(scored) :] != scored:
        return None
    logprobs = [float(each) for each in rolled.logprobs[-len(scored) :]]
    return TokenScores(
        scored,
        _pieces(tokenizer, [each for each in ids[: -len(scored)] if each not in tokenizer.all_special_ids], scored),
        [round(each, 4) if math.isfinite(each) else None for each in logprobs],
    )


def _pieces(tokenizer: Any, context: Sequence[int], scored: Sequence[int]) -> list[str]:
    """Return the text that each token adds, decoded after a few tokens before it, as for streamed text."""
    ids, pieces = [*context[-4:], *scored], list[str]()
    done = start = len(ids) - len(scored)
    for end in range(start + 1, len(ids) + 1):
        window = max(0, done - 4)
        before, after = (tokenizer.decode(ids[window:stop]) for stop in (done, end))
        whole = not after.endswith("\N{REPLACEMENT CHARACTER}") or end == len(ids)
        pieces.append(after[len(before) :] if whole else "")
        done = end if whole else done
    return pieces
