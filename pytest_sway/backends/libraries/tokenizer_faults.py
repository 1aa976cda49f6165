"""Find the file and field of a tokenizer that is at fault if a text cannot be tokenised."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.libraries.culprits import Asked, culprit
from pytest_sway.system.reading import TOKENIZER_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pytest_sway.backends.libraries.culprits import Contents, Field

__tracebackhide__ = True

FILES: Final = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "config.json",
)  # fmt: skip
"""The JSON files, the small ones first, since each of their fields is tried."""
MINIMAL: Final[Mapping[Field, Any]] = {
    ("tokenizer.json", "model"): {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
    ("tokenizer.json", "added_tokens"): [],
}
"""Values for fields without which no tokenizer loads."""
_WORDS: Final = {"type": "Whitespace"}
_TEMPLATE_FILE: Final = "chat_template.jinja"
_TEMPLATE: Final = "chat_template"


def other_parts(contents: Contents) -> Iterator[tuple[Field, Any]]:
    """Yield a pre-tokenizer if ``tokenizer.json`` lacks one, without which no words are known."""
    if "tokenizer.json" in contents and contents["tokenizer.json"].get("pre_tokenizer") is None:
        yield ("tokenizer.json", "pre_tokenizer"), _WORDS


def template_place(tokenizer: Any) -> str:
    """Return the place of a tokenizer's chat template, for an error."""
    folder = _folder(tokenizer)
    if folder is not None and (folder / _TEMPLATE_FILE).is_file():
        return repr(str(folder / _TEMPLATE_FILE))
    for path in [] if folder is None else [folder / name for name in FILES]:
        try:
            told = json.loads(read_bounded(path, TOKENIZER_BYTES)).get(_TEMPLATE)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if told is not None:
            return f"{_TEMPLATE} in {str(path)!r}"
    return f"{_TEMPLATE_FILE}, or {_TEMPLATE} in tokenizer_config.json"


def fault(tokenizer: Any, fails: Callable[[Any], bool]) -> str:
    """Return sentences on the file and field of a tokenizer that make something fail, or on its files if none is found.

    Args:
        tokenizer: The tokenizer.
        fails: Returns whether it fails with a given tokenizer.
    """
    folder = _folder(tokenizer)
    if folder is None:
        return ""

    def attempt(folder: Path) -> None:
        from transformers import AutoTokenizer

        from pytest_sway.backends.libraries.process import quiet_libraries

        with quiet_libraries():
            if fails(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)):
                raise ValueError("it fails again")

    found = culprit(Asked("the tokenizer", folder, FILES, attempt, others=other_parts, minimal=MINIMAL), "")
    if found is None:
        files = ", ".join(name for name in FILES if (folder / name).is_file())
        return f" The tokenizer is that of {str(folder)!r} ({files})."
    return f" The cause is the tokenizer: {found}. {found.advice}"


def _folder(tokenizer: Any) -> Path | None:
    """The folder that a tokenizer was loaded from; ``None`` if it is from a hub."""
    name = getattr(tokenizer, "name_or_path", None)
    return Path(name) if name and os.path.isdir(name) else None
