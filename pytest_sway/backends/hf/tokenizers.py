"""Which tokenizer a backend uses: its base's, unless the adapter's folder brings another one."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.base import load_tokenizer
from pytest_sway.backends.hf.base_files import base_file
from pytest_sway.backends.hf.tokenizer_copies import RustRecord
from pytest_sway.reading import TOKENIZER_BYTES, read_bounded

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.base import LoadedBase
    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_CONFIG: Final = "tokenizer_config.json"
_FILES: Final = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_WRITTEN_BY_SAVE: Final = frozenset({"name_or_path", "transformers_version", "local_files_only", "is_local"})


def adapter_tokenizer(base: LoadedBase, files: AdapterFiles) -> RustRecord | None:
    """Return the tokenizer that an adapter brings, in its record; ``None`` if it brings no other than its base's.

    A folder with a ``tokenizer_config.json`` brings its own, as for dlm-sway. Where that is the base's, file by file,
    the base's is shared: loading one takes seconds where the vocabulary is large.
    """
    folder = files.folder
    if not brings_tokenizer(base.spec, folder):
        return None
    key = _digest(folder)
    with base.lock:
        record = base.tokenizers.get(key)
        if record is None:
            record = base.tokenizers[key] = RustRecord(load_tokenizer(base.spec, str(folder)))
        return record


def brings_tokenizer(base: ModelSpec, folder: Path) -> bool:
    """Whether an adapter's folder has a tokenizer that is another one than its base's."""
    return (folder / _CONFIG).is_file() and not _same(base, folder)


def _same(base: ModelSpec, folder: Path) -> bool:
    theirs = base_file(base, _CONFIG)
    if theirs is None or _settings(theirs) != _settings(folder / _CONFIG):
        return False
    for name in _FILES:
        own, other = folder / name, base_file(base, name)
        if own.is_file() != (other is not None):
            return False
        if other is not None and read_bounded(own, TOKENIZER_BYTES) != read_bounded(other, TOKENIZER_BYTES):
            return False
    return True


def _settings(path: Path) -> Any:
    try:
        settings = json.loads(read_bounded(path, TOKENIZER_BYTES))
        return {name: value for name, value in settings.items() if name not in _WRITTEN_BY_SAVE}
    except (OSError, ValueError, AttributeError):
        return path  # equal to nothing


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (_CONFIG, *_FILES):
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(read_bounded(path, TOKENIZER_BYTES)).digest())
    return digest.hexdigest()
