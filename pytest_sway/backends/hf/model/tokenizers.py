"""Which tokenizer a backend uses: its base's, unless the adapter's folder brings another one, or parts of one."""

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
)

if TYPE_CHECKING:
    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.base import LoadedBase

__tracebackhide__ = True


def adapter_tokenizer(base: LoadedBase, files: AdapterFiles) -> RustRecord | None:
    """Return the tokenizer that an adapter brings, in its record; ``None`` if it brings no other than its base's.

    A folder with a ``tokenizer_config.json`` brings its own, as for dlm-sway. One with a vocabulary or a chat template
    alone brings that, and the rest is the base's. Where all of it is the base's, file by file, the base's is shared:
    loading one takes seconds where the vocabulary is large.
    """
    folder = files.folder
    if not brings_tokenizer(base.spec, folder):
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
        tokenizer.name_or_path = str(folder)  # where its errors look for what is at fault
        return tokenizer
    with completed(base.tokenizer, folder) as whole:
        tokenizer = load_tokenizer(base.spec, str(whole))
        tokenizer.name_or_path = str(folder)
        return tokenizer
