"""Read the tokenizer files of an adapter's folder, and complete them with the base's."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.backends.libraries.process import quiet_libraries
from pytest_sway.system.reading import CONFIG_BYTES, TOKENIZER_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_CONFIG: Final = "tokenizer_config.json"
_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FILES: Final = (*_VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json")
_TEMPLATE: Final = "chat_template.jinja"
_MORE_TEMPLATES: Final = "additional_chat_templates"
_OF_WORDS: Final = "added_tokens_decoder"
"""The field of a tokenizer's settings that repeats its vocabulary."""

_WRITTEN_BY_SAVE: Final = frozenset({"name_or_path", "transformers_version", "local_files_only", "is_local"})


def brings_tokenizer(base: ModelSpec, folder: Path) -> bool:
    """Return whether an adapter's folder has a tokenizer, or parts of one, that differ from its base's."""
    return has_tokenizer(folder) and not _same(base, folder)


def has_tokenizer(folder: Path) -> bool:
    """Return whether an adapter's folder has a tokenizer, or parts of one."""
    return _has(folder, _CONFIG, *_VOCABULARIES) or bool(_templates(folder))


@contextmanager
def completed(tokenizer: Any, folder: Path) -> Iterator[Path]:
    """Yield a folder from which transformers loads the tokenizer of an adapter.

    Args:
        tokenizer: The base's tokenizer, for what the adapter's folder lacks.
        folder: The adapter's folder, which is yielded itself if it lacks nothing.
    """
    if _has(folder, _CONFIG):
        yield folder
        return
    with TemporaryDirectory(prefix="pytest-sway-") as temporary:
        made = Path(temporary)
        with quiet_libraries():
            tokenizer.save_pretrained(made)
        settings = json.loads((made / _CONFIG).read_bytes())
        if _has(folder, *_VOCABULARIES):
            settings.pop(_OF_WORDS, None)
            for name in (*_VOCABULARIES, "merges.txt", "added_tokens.json"):
                (made / name).unlink(missing_ok=True)
        for name in (name for name in _FILES if _has(folder, name)):
            shutil.copyfile(folder / name, made / name)
        if _templates(folder):
            (made / _TEMPLATE).unlink(missing_ok=True)
            shutil.rmtree(made / _MORE_TEMPLATES, ignore_errors=True)
            settings["chat_template"] = _read_templates(folder)
        (made / _CONFIG).write_text(json.dumps(settings), "utf-8")
        yield made


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).is_file() for name in names)


def _templates(folder: Path) -> dict[str, str]:
    """The files of a folder's chat templates, by transformers' names for them."""
    more = sorted(path.name for path in (folder / _MORE_TEMPLATES).glob("*.jinja"))
    found = {name.removesuffix(".jinja"): f"{_MORE_TEMPLATES}/{name}" for name in more}
    return {"default": _TEMPLATE} | found if _has(folder, _TEMPLATE) else found


def _read_templates(folder: Path) -> str | dict[str, str]:
    """The chat templates of a folder, as transformers stores them: a text, if there is only the default one."""
    texts = {
        name: read_bounded(folder / file, CONFIG_BYTES).decode("utf-8") for name, file in _templates(folder).items()
    }
    return texts["default"] if texts.keys() == {"default"} else texts


def _same(base: ModelSpec, folder: Path) -> bool:
    """Whether a folder's tokenizer files equal the base's. A folder with settings must bring all of them."""
    whole = _has(folder, _CONFIG)
    if whole:
        theirs = base_file(base, _CONFIG)
        if theirs is None or _settings(theirs) != _settings(folder / _CONFIG):
            return False
    for name in (*_FILES, *({_TEMPLATE} | set(_templates(folder).values()))):
        own, other = folder / name, base_file(base, name)
        if own.is_file() != (other is not None):
            if whole or other is None:
                return False
        elif other is not None and read_bounded(own, TOKENIZER_BYTES) != read_bounded(other, TOKENIZER_BYTES):
            return False
    return True


def _settings(path: Path) -> Any:
    try:
        settings = json.loads(read_bounded(path, TOKENIZER_BYTES))
        return {name: value for name, value in settings.items() if name not in _WRITTEN_BY_SAVE}
    except (OSError, ValueError, AttributeError, RecursionError):
        return path  # it equals no settings


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (_CONFIG, *_FILES, *_templates(folder).values()):
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(read_bounded(path, TOKENIZER_BYTES)).digest())
    return digest.hexdigest()
