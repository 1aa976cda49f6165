"""Chooses a backend's tokenizer: the base's, or what the adapter's folder brings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.model.base import load_tokenizer
from pytest_sway.backends.local.tokenizer_copies import RustRecord, copied
from pytest_sway.backends.local.tokenizer_files import (
    _CONFIG,
    _VOCABULARIES,
    _digest,
    _has,
    _read_templates,
    brings_tokenizer,
    completed,
    has_tokenizer,
)

if TYPE_CHECKING:
    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.base import LoadedBase

__tracebackhide__ = True


def adapter_tokenizer(base: LoadedBase, files: AdapterFiles) -> RustRecord | None:
    """Return the tokenizer that an adapter brings, in its record; ``None`` if the base's is used.

    A folder with a ``tokenizer_config.json`` brings a whole tokenizer, as in dlm-sway. A folder with only a vocabulary
    or a chat template replaces that part of the base's. If all of its files equal the base's, the base's tokenizer is
    shared, because loading a large vocabulary takes seconds.
    """
    folder = files.folder
    if not (brings_tokenizer(base.spec, folder) if base.has_tokenizer_of_files else has_tokenizer(folder)):
        return None
    key = _digest(folder)
    with base.lock:
        record = base.tokenizers.get(key)
        if record is None:
            record = base.tokenizers[key] = RustRecord(_loaded(base, folder))
        return record


def _loaded(base: LoadedBase, folder: Path) -> Any:
    if not _has(folder, _CONFIG, *_VOCABULARIES):
        tokenizer = copied(base.tokenizer)  # a template needs no second vocabulary in memory
        tokenizer.chat_template = _read_templates(folder)
        tokenizer.name_or_path = str(folder)  # errors about the tokenizer name this folder
        return tokenizer
    with completed(base.tokenizer, folder) as whole:
        tokenizer = load_tokenizer(base.spec, str(whole))
        tokenizer.name_or_path = str(folder)
        return tokenizer
