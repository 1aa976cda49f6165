"""Copies of a tokenizer for tests: settings of their own, around a Rust object that all copies share.

A copy of the Rust object with its vocabulary would take up to seconds, and 220 MB for a vocabulary of 262k. So the
copies share one, and `RustRecord` detects changes to it. The engines' own Rust object is another one around the same
vocabulary, which takes milliseconds: each call of a tokenizer sets padding and truncation on its Rust object, and would
cut the texts that another thread tokenises meanwhile.
"""

from __future__ import annotations

import copy
from typing import Any, Final

__tracebackhide__ = True

_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_OF_TESTS: Final = "_pytest_sway_of_tests"
"""The attribute of an engine's Rust object that holds the one of the tests."""


def copied(tokenizer: Any) -> Any:
    """Return a copy with settings of its own, around the same Rust object."""
    made = copy.copy(tokenizer)
    vars(made).update({name: _own(value) for name, value in vars(tokenizer).items()})
    return made


def copied_for_test(tokenizer: Any) -> Any:
    """Return a copy with settings of its own, around the Rust object of all tests. `RustRecord` watches it."""
    made = copied(tokenizer)
    rust = _rust_of(tokenizer)
    if rust is not None:
        made._tokenizer = _of_tests(rust)
    return made


def _of_tests(rust: Any) -> Any:
    """Return the Rust object of the tests beside an engine's; the engine's own if a new one would differ from it."""
    found = vars(rust).get(_OF_TESTS)
    if found is None:
        made = _around_the_same_vocabulary(rust)
        if _fingerprint(made) != _fingerprint(rust):
            return rust
        found = vars(rust).setdefault(_OF_TESTS, made)  # another thread may have been faster
    return found


def _around_the_same_vocabulary(rust: Any) -> Any:
    """Return a new Rust object around the parts of one."""
    made = type(rust)(rust.model)
    for name in _PARTS:
        if getattr(rust, name) is not None:
            setattr(made, name, getattr(rust, name))
    made.add_tokens([token for _, token in sorted(rust.get_added_tokens_decoder().items())])
    made.encode_special_tokens = rust.encode_special_tokens
    return made


def _own(value: Any) -> Any:
    """A copy of a container, with the same members; anything else unchanged."""
    if isinstance(value, dict | list | set):
        return copy.copy(value)
    return copy.deepcopy(value) if type(value).__name__ == "Trie" else value


class RustRecord:
    """The state of a tokenizer's Rust objects, except for padding and truncation, which each call sets anew.

    Attributes:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._before = _fingerprint(_rust_of(tokenizer))

    def changes(self) -> list[str]:
        """Return one line for each part that has changed."""
        rust = _rust_of(self.tokenizer)
        if rust is None:
            return []
        now = [_fingerprint(each) for each in (rust, vars(rust).get(_OF_TESTS, rust))]
        return [
            f"tokenizer: its {name} changed"
            for name, before in self._before.items()
            if any(each[name] != before for each in now)
        ]


def _rust_of(tokenizer: Any) -> Any:
    """The Rust object of a tokenizer; ``None`` if it has none."""
    rust = getattr(tokenizer, "backend_tokenizer", None)
    return rust if hasattr(rust, "get_added_tokens_decoder") else None


def _fingerprint(rust: Any) -> dict[str, Any]:
    """The state of each part of a Rust object; empty for ``None``."""
    if rust is None:
        return {}
    parts = {name.replace("_", "-"): _state(getattr(rust, name)) for name in _PARTS}
    added = {number: str(token) for number, token in rust.get_added_tokens_decoder().items()}
    return {**parts, "added tokens": added, "vocabulary": rust.get_vocab_size(with_added_tokens=False)}


def _state(part: Any) -> Any:
    return None if part is None else part.__getstate__()
