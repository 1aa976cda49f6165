"""A test's own tokenizer: a copy with settings of its own, around the object in Rust that all copies share."""

from __future__ import annotations

import copy
from typing import Any, Final

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_PARTS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def copied(tokenizer: Any) -> Any:
    """Return a tokenizer whose settings are its own; what it shares with the other, `RustRecord` watches."""
    made = copy.copy(tokenizer)
    containers = {name: copy.copy(value) for name, value in vars(made).items() if isinstance(value, dict | list | set)}
    vars(made).update(containers)
    return made


class RustRecord:
    """What a tokenizer's object in Rust was like."""

    def __init__(self, tokenizer: Any) -> None:
        self._rust = getattr(tokenizer, "backend_tokenizer", None)
        self._before = self._state()

    def changes(self) -> list[str]:
        """One line for each part of it that is no longer as it was."""
        now = self._state()
        return [f"tokenizer: its {name} changed" for name, before in self._before.items() if now[name] != before]

    def _state(self) -> dict[str, Any]:
        if self._rust is None:
            return {}
        parts = {name: getattr(self._rust, name) for name in _PARTS}
        states = {name: None if part is None else part.__getstate__() for name, part in parts.items()}
        added = {number: str(token) for number, token in self._rust.get_added_tokens_decoder().items()}
        return states | {"added tokens": added}
