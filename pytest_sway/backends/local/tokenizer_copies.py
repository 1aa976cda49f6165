"""Copies of a tokenizer for tests: settings of their own, around a Rust object that all copies share.

A copy of the Rust object would take up to seconds, and 220 MB for a vocabulary of 262k. So it is shared, and
`RustRecord` detects changes to it.
"""

from __future__ import annotations

import copy
from typing import Any, Final

__tracebackhide__ = True

_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def copied(tokenizer: Any) -> Any:
    """Return a copy with settings of its own. `RustRecord` watches what both share."""
    made = copy.copy(tokenizer)
    vars(made).update({name: _own(value) for name, value in vars(tokenizer).items()})
    return made


def _own(value: Any) -> Any:
    """A copy of a container, with the same members; anything else unchanged."""
    if isinstance(value, dict | list | set):
        return copy.copy(value)
    return copy.deepcopy(value) if type(value).__name__ == "Trie" else value


class RustRecord:
    """The state of a tokenizer's Rust object, except for padding and truncation, which each call sets anew.

    Attributes:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._before = _fingerprint(tokenizer)

    def changes(self) -> list[str]:
        """Return one line for each part that has changed."""
        now = _fingerprint(self.tokenizer)
        return [f"tokenizer: its {name} changed" for name, before in self._before.items() if now[name] != before]


def _fingerprint(tokenizer: Any) -> dict[str, Any]:
    """The state of each part of the Rust object; empty for a tokenizer without one."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None or not hasattr(rust, "get_added_tokens_decoder"):
        return {}
    parts = {name.replace("_", "-"): _state(getattr(rust, name)) for name in _PARTS}
    added = {number: str(token) for number, token in rust.get_added_tokens_decoder().items()}
    return {**parts, "added tokens": added, "vocabulary": rust.get_vocab_size(with_added_tokens=False)}


def _state(part: Any) -> Any:
    return None if part is None else part.__getstate__()
