"""Ends generated tokens at stop texts, which may begin and end inside of tokens.

A stop text is looked for in the text without special tokens, and in the text with them: so ``<|im_end|>`` is found,
and a text around a special token, too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.questions import until

if TYPE_CHECKING:
    from collections.abc import Sequence

__tracebackhide__ = True

_MARGIN: Final = 4
"""Tokens before those that can hold a stop text: a tokenizer may strip the beginning of what it decodes."""


def stopped_text(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> str:
    """Return new tokens as text without special tokens, up to the stop text that the tokens completed first."""
    if not stop or not _found(tokenizer, ids, stop):
        return _text(tokenizer, ids)
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
    reach = max(len(text.encode()) for text in stop) + _MARGIN  # a token is at least a byte
    return _found(tokenizer, ids[-reach:], stop) and (len(ids) <= reach or _found(tokenizer, ids, stop))


def _found(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> bool:
    texts = (_text(tokenizer, ids), _text(tokenizer, ids, special=True))
    return any(each in text for each in stop for text in texts)


def _text(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special))
