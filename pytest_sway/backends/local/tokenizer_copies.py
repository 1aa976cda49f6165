"""A test's own tokenizer: a copy with settings of its own, around the object in Rust that all copies share.

A copy of the object in Rust takes up to seconds, and 220 MB for a vocabulary of 262k. So it is shared, and a record
tells whether somebody has changed it.
"""

from __future__ import annotations

import copy
from typing import Any, Final

__tracebackhide__ = True

_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def copied(tokenizer: Any) -> Any:
    """Return a tokenizer whose settings are its own; what it shares with the other, `RustRecord` watches."""
    made = copy.copy(tokenizer)
    vars(made).update({name: _own(value) for name, value in vars(tokenizer).items()})
    return made


def _own(value: Any) -> Any:
    """A container like another one, with the same members; anything else as it is."""
    if isinstance(value, dict):
        return type(value)(value) if type(value) is dict else copy.copy(value)
    if isinstance(value, list | set):
        return copy.copy(value)
    return copy.deepcopy(value) if type(value).__name__ == "Trie" else value


class RustRecord:
    """What a tokenizer's object in Rust was like; padding and truncation are set anew by each call, and do not count.

    Attributes:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._before = _fingerprint(tokenizer)

    def changes(self) -> list[str]:
        """One line for each part of it that is no longer as it was."""
        now = _fingerprint(self.tokenizer)
        return [f"tokenizer: its {name} changed" for name, before in self._before.items() if now[name] != before]


def _fingerprint(tokenizer: Any) -> dict[str, Any]:
    """What the parts of the object in Rust are; empty for a tokenizer without one."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None or not hasattr(rust, "get_added_tokens_decoder"):
        return {}
    parts = {name.replace("_", "-"): _state(getattr(rust, name)) for name in _PARTS}
    added = {number: str(token) for number, token in rust.get_added_tokens_decoder().items()}
    return {**parts, "added tokens": added, "vocabulary": rust.get_vocab_size(with_added_tokens=False)}


def _state(part: Any) -> Any:
    return None if part is None else part.__getstate__()
