"""What makes two specs one: the keys under which what is loaded is shared.

Two specs with equal keys are served by one backend, so a key holds everything that changes what is loaded and nothing
else. The contents of an adapter's folder are part of it: retraining into the same folder is another adapter.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.paths import GGUF_SUFFIX
from pytest_sway.system.reading import open_regular

__tracebackhide__ = True

_WEIGHTS: Final = re.compile(r"(.*\.(safetensors|gguf)|pytorch_model.*\.bin)(\.index\.json)?")
"""Files that are looked at whenever a model is asked for, beside its config.json."""

_MODEL_FILES: Final = re.compile(
    r".*\.(safetensors|gguf|model|jinja|py)|pytorch_model.*\.bin|(vocab|merges)\.txt"
    r"|(generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|chat_template|.*\.index)\.json"
)
"""Files that decide what a model's folder loads, beside its config.json; reports and logs are not among them."""

Key: TypeAlias = tuple[Hashable, ...]


def resolved_key(spec: ModelSpec) -> Key:
    """Return the identity of a spec whose device and dtype are already those that will be used."""
    adapter = None if spec.adapter is None else str(spec.adapter)
    return (
        *_settings(spec),
        _answers_identity(spec.answers),
        _model_identity(spec.base),
        None if spec.finetuned is None else _model_identity(spec.finetuned),
        None if adapter is None else _adapter_digest(adapter, _adapter_signature(adapter)),
    )


def adapter_digest_in(key: Key) -> str | None:
    """Return the digest of the adapter's files that a resolved spec's key holds; ``None`` where it has none."""
    return key[-1] if isinstance(key[-1], str) else None


@lru_cache(maxsize=256)
def _settings(spec: ModelSpec) -> Key:
    """What a spec's own fields add to its key, whatever the files hold that they name."""
    return (
        spec.kind,
        spec.base,
        None if spec.adapter is None else str(spec.adapter),
        spec.dtype,
        spec.device,
        spec.revision,
        spec.entry_point,
        spec.endpoint,
        spec.allow_pickle,
        spec.finetuned,
        spec.finetuned_endpoint,
        spec.api_key_env,
        spec.timeout,
        spec.model_kwargs,
        spec.finetuned_model_kwargs,
    )


def state_of_files(spec: ModelSpec) -> Hashable:
    """Return what changes whenever somebody writes to the files of a spec, also where they hold the same afterwards.

    It says nothing of the kinds whose files are others' to read and write.
    """
    if spec.kind not in ("hf", "mlx", "dummy"):
        return None
    return (
        _model_signature(spec.base, _MODEL_FILES),
        None if spec.finetuned is None else _model_signature(spec.finetuned, _MODEL_FILES),
        None if spec.adapter is None else _adapter_signature(str(spec.adapter)),
        _stats((str(spec.answers),)) if isinstance(spec.answers, Path) else None,
    )


def base_key(spec: ModelSpec) -> Key:
    """Return the identity of the base of a resolved spec: equal for all adapters that can share it."""
    return resolved_key(base_spec(spec))


def base_spec(spec: ModelSpec) -> ModelSpec:
    """Return the spec of the base alone."""
    if spec.adapter is None and spec.finetuned is None:
        return spec
    return replace(spec, adapter=None, finetuned=None, finetuned_endpoint=None, finetuned_model_kwargs=None)


def finetuned_spec(spec: ModelSpec) -> ModelSpec | None:
    """Return the spec of the fine-tuned model as a base of its own; ``None`` where there is none.

    The revision is the base's, and so is not the fine-tuned model's; ``model_kwargs`` are, unless it has its own.
    """
    if spec.finetuned is None:
        return None
    theirs = spec.model_kwargs if spec.finetuned_model_kwargs is None else spec.finetuned_model_kwargs
    return replace(
        spec, base=spec.finetuned, finetuned=None, revision=None, model_kwargs=theirs, finetuned_model_kwargs=None
    )


def with_adapter(spec: ModelSpec, adapter_path: Path | str | None) -> ModelSpec:
    """Return ``spec`` with ``adapter_path`` in its adapter's place, or as it is where that is ``None``."""
    return spec if adapter_path is None else replace(spec, adapter=adapter_path)  # type: ignore[arg-type] # checked


def _answers_identity(answers: Mapping[str, Any] | str | Path | None) -> Hashable:
    if not isinstance(answers, Path):
        return answers if answers is None else str(answers)
    return (str(answers), _file_digest(str(answers), _stats((str(answers),))))


_Signature: TypeAlias = tuple[tuple[int, int, int, int], ...]
_IDENTITY_FILES: Final = re.compile(
    r".*\.(safetensors|jinja|model|txt)|(?!trainer_state).*\.json|(adapter_model|new_embeddings).*\.bin"
)
"""Files that decide what an adapter's folder loads; a checkpoint's optimizer state and README do not."""


def _model_signature(model: str, files: re.Pattern[str] = _WEIGHTS) -> _Signature | None:
    """The state of files that a local model is loaded from; their contents are too much to read."""
    if not os.path.isabs(model):
        return None
    if model.endswith(GGUF_SUFFIX):
        return _stats((model,))
    return _stats((f"{model}/config.json", *_listed(model, files)))


def _model_identity(model: str) -> Hashable:
    """What tells one state of a local model from another, at each request.

    Its config.json and its weights are looked at each time. Its other files are looked at when the folder itself has
    changed, as it does when a file is replaced, added or removed, and after `look_again`: it would take as long again
    to look at all of them each time.
    """
    if not _is_folder(model):
        return _model_signature(model)
    try:
        folder = os.stat(model)
    except OSError:
        return _model_signature(model)
    looked_at, others = _model_folder(model, folder.st_mtime_ns, folder.st_ino)
    return _stats(looked_at), others


@lru_cache(maxsize=256)
def _is_folder(model: str) -> bool:
    """Whether a model is named by a folder, not by a hub id or a GGUF file."""
    return os.path.isabs(model) and not model.endswith(GGUF_SUFFIX)


def look_again() -> None:
    """Have all files of local models be looked at once more, at the next request for each: some may be written to."""
    _model_folder.cache_clear()


@lru_cache(maxsize=256)
def _model_folder(model: str, mtime_ns: int, inode: int) -> tuple[tuple[str, ...], _Signature]:
    """The files to look at each time, and the state that all others were in when the folder changed."""
    looked_at = (f"{model}/config.json", *_files(model, _WEIGHTS, mtime_ns, inode))
    return looked_at, _stats(_files(model, _MODEL_FILES, mtime_ns, inode))


def _adapter_signature(folder: str) -> _Signature:
    """The state of the files that an adapter is loaded from."""
    return _stats(_listed(folder, _IDENTITY_FILES))


def _listed(folder: str, names: re.Pattern[str]) -> tuple[str, ...]:
    """The paths of a folder's files of such names; none if there is no such folder."""
    try:
        listed = os.stat(folder)
        return _files(folder, names, listed.st_mtime_ns, listed.st_ino)
    except OSError:
        return ()


def _stats(paths: tuple[str, ...]) -> _Signature:
    return tuple([_state_of(path) for path in paths])


def _state_of(path: str) -> tuple[int, int, int, int]:
    try:
        st = os.stat(path)
    except OSError:
        return (0, 0, 0, 0)
    return (st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino)


_TEMPLATES: Final = "additional_chat_templates"
"""The folder inside of a tokenizer's where transformers puts chat templates that have names."""


@lru_cache(maxsize=256)
def _files(folder: str, names: re.Pattern[str], _mtime_ns: int, _inode: int) -> tuple[str, ...]:
    """They are the same until the folder's modification time changes."""
    with os.scandir(folder) as entries:
        found = [e.path for e in entries if e.is_file() and names.fullmatch(e.name)]
    return (*sorted(found), *sorted(str(path) for path in Path(folder, _TEMPLATES).glob("*.jinja")))


_MOST_DIGESTED: Final = 2**30
"""Bytes, which take a second or two; most adapters have far less."""


@lru_cache(maxsize=256)
def _file_digest(path: str, signature: _Signature) -> str:
    """A digest of a file's content, which is read again only when its signature has changed.

    For a file that takes long to read, the signature itself stands, as for the files of a model.
    """
    if any(size > _MOST_DIGESTED for size, *_ in signature):
        return str(signature)
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"


@lru_cache(maxsize=256)
def _adapter_digest(folder: str, signature: _Signature) -> str | None:
    """A digest of the contents of an adapter's files; they are read again only when their signature has changed."""
    if not signature:
        return None
    digest = hashlib.sha256()
    for path in _listed(folder, _IDENTITY_FILES):
        digest.update(f"{os.path.basename(path)}\0{_file_digest(path, _stats((path,)))}".encode())
    return digest.hexdigest()
