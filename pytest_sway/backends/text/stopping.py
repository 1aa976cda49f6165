"""Ends generated tokens at end tokens, and at stop texts, which may begin and end inside of tokens.

A stop text is looked for in the text without special tokens, and in the text with them: so ``<|im_end|>`` is found,
and a text around a special token, too.

The first bytes of a character decode to U+FFFD until the others have come. So a stop text with U+FFFD is found once
other tokens have come, or none will.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.questions import until

if TYPE_CHECKING:
    from collections.abc import Sequence

__tracebackhide__ = True

_MARGIN: Final = 4
"""Tokens before those that can hold a stop text: a tokenizer may strip the beginning of what it decodes."""

_UNKNOWN: Final = "\ufffd"
_UNFINISHED: Final = 3
"""The most bytes of a character that lacks some; some tokenizers decode each of them to U+FFFD."""


def ends_of(configured: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end a text: the configured ones, and the tokenizer's EOS, as in lm-evaluation-harness.

    An adapter can have learned another end than its base's; its own tokenizer tells it.

    Args:
        configured: The ``eos_token_id`` of the base's generation settings: a token, several, or ``None``.
        tokenizer: The view's tokenizer.
    """
    ends = configured if isinstance(configured, Iterable) else [configured]
    return tuple(dict.fromkeys(int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None))


def stopped_text(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> str:
    """Return new tokens as text without special tokens, up to the stop text that the tokens completed first."""
    if not stop or not _found(tokenizer, ids, stop):
        return until(_text(tokenizer, ids), stop)
    ids = ids[: 1 + bisect_left(range(1, len(ids)), True, key=lambda count: _found(tokenizer, ids[:count], stop))]
    text = _text(tokenizer, ids)
    cut = until(text, stop)
    if cut != text:
        return cut
    cut = until(_text(tokenizer, ids, special=True), stop)
    before = bisect_right(range(len(ids)), len(cut), key=lambda count: len(_text(tokenizer, ids[:count], special=True)))
    whole = ids[: before - 1]
    return _text(tokenizer, whole) + cut[len(_text(tokenizer, whole, special=True)) :]


def has_stopped(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Return whether the last of the new tokens completes a stop text; to be asked after each token."""
    unfinished = _UNFINISHED * len(_UNKNOWN.encode())
    reach = max(len(text.encode()) for text in stop) + unfinished + _MARGIN  # a token is at least a byte
    return _found(tokenizer, ids[-reach:], stop) and (len(ids) <= reach or _found(tokenizer, ids, stop))


def _found(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> bool:
    texts = (_text(tokenizer, ids), _text(tokenizer, ids, special=True))
    return any(each in _finished(text) for each in stop for text in texts)


def _finished(text: str) -> str:
    """Return a text without what may be the beginning of a character."""
    return text[: max(len(text.rstrip(_UNKNOWN)), len(text) - _UNFINISHED)]


def _text(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special))
