"""Cache keys: specs with equal keys share one backend.

A key holds everything that changes what is loaded, and nothing else. The contents of an adapter's folder are part of
it, since retraining into the same folder gives another adapter.
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

from pytest_sway.errors import SpecError
from pytest_sway.spec.kinds import KINDS
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.spec.paths import GGUF_SUFFIX, in_hub_cache
from pytest_sway.spec.tasks import CAUSAL
from pytest_sway.system.reading import open_regular
from pytest_sway.system.wording import shown

__tracebackhide__ = True

_WEIGHTS: Final = re.compile(r"(.*\.(safetensors|gguf)|pytorch_model.*\.bin)(\.index\.json)?")
"""Files that are checked at each request for a model, besides its config.json."""

_MODEL_FILES: Final = re.compile(
    r".*\.(safetensors|gguf|model|jinja|py)|pytorch_model.*\.bin|(vocab|merges)\.txt"
    r"|(generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|chat_template|.*\.index)\.json"
    r"|(modules|(config_)?sentence_.*)\.json"
)
"""Files that decide what a model's folder loads, besides its config.json. Reports and logs do not."""

Key: TypeAlias = tuple[Hashable, ...]


def resolved_key(spec: ModelSpec) -> Key:
    """Return the cache key of a spec whose device and dtype are resolved."""
    return (
        *_settings(spec),
        _answers_identity(spec.answers),
        _model_identity(spec.base),
        None if spec.finetuned is None else _model_identity(spec.finetuned),
        _adapters_digest(spec),
    )


def adapter_digest_in(key: Key) -> str | None:
    """Return the digest of the adapters' files that a resolved spec's key holds; ``None`` where it has none."""
    return key[-1] if isinstance(key[-1], str) else None


def _adapters_digest(spec: ModelSpec) -> str | None:
    """One adapter's digest, or those of all adapters in their order; ``None`` where a file is not there."""
    if isinstance(spec.adapter, Path):  # as of nearly all specs, at each request
        folder, seen = str(spec.adapter), spec._seen
        if seen is None:
            return _adapter_digest(folder, _adapter_signature(folder))
        object.__setattr__(spec, "_seen", None)
        return _adapter_digest(folder, seen)
    folders = map(str, spec.adapters)
    digests = [_adapter_digest(folder, _adapter_signature(folder)) for folder in folders]
    return "+".join(digest or "" for digest in digests) or None


@lru_cache(maxsize=256)
def _settings(spec: ModelSpec) -> Key:
    """The part of the key that the spec's fields give by themselves, whatever the files hold."""
    return (
        spec.kind,
        spec.base,
        _adapter_names(spec),
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
        spec.adapter_revision,
        spec.adapter_subfolder,
        spec.model_kwargs,
        spec.finetuned_model_kwargs,
        spec.task or CAUSAL,
    )


def _adapter_names(spec: ModelSpec) -> str | tuple[str, ...] | None:
    if spec.adapter is None:
        return None
    names = tuple(_adapter_name(str(adapter)) for adapter in spec.adapters)
    return names if len(names) > 1 else names[0]


def _adapter_name(adapter: str) -> str:
    """What an adapter is called in a key; a snapshot of a hub goes without its commit, since its contents count."""
    cached = in_hub_cache(adapter)
    return adapter if cached is None else cached.name


def state_of_files(spec: ModelSpec) -> Hashable:
    """Return a value that changes with every write to a spec's files, even if they hold the same afterwards.

    It is ``None`` for the kinds whose files are read and written elsewhere.
    """
    if not KINDS[spec.kind].of_files:
        return None
    return (
        _model_signature(spec.base, _MODEL_FILES),
        None if spec.finetuned is None else _model_signature(spec.finetuned, _MODEL_FILES),
        tuple([_adapter_signature(str(adapter)) for adapter in spec.adapters]),
        _stats((str(spec.answers),)) if isinstance(spec.answers, Path) else None,
    )


def base_key(spec: ModelSpec) -> Key:
    """Return the cache key of a resolved spec's base; adapters that can share the base get the same."""
    return resolved_key(base_spec(spec))


def base_spec(spec: ModelSpec) -> ModelSpec:
    """Return the spec of the base alone."""
    if spec.adapter is None and spec.finetuned is None:
        return spec
    return replace(
        spec,
        adapter=None,
        adapter_revision=None,
        adapter_subfolder=None,
        finetuned=None,
        finetuned_endpoint=None,
        finetuned_model_kwargs=None,
    )


def finetuned_spec(spec: ModelSpec) -> ModelSpec | None:
    """Return the spec of the fine-tuned model as a base of its own; ``None`` if there is none.

    It has no revision, since the spec's is the base's. It has the base's ``model_kwargs``, unless it has its own.
    """
    if spec.finetuned is None:
        return None
    theirs = spec.model_kwargs if spec.finetuned_model_kwargs is None else spec.finetuned_model_kwargs
    return replace(base_spec(spec), base=spec.finetuned, revision=None, model_kwargs=theirs)


def merged_spec(spec: ModelSpec) -> ModelSpec | None:
    """Return the spec of what the last adapter is put on: all others, to be merged; ``None`` if there are none."""
    return None if len(spec.adapters) < 2 else replace(spec, adapter=spec.adapters[:-1])


def with_adapter(spec: ModelSpec, adapter_path: Path | str | None) -> ModelSpec:
    """Return ``spec`` with ``adapter_path`` as its last adapter; unchanged if that is ``None``.

    Raises:
        SpecError: ``adapter_path`` names no adapter.
    """
    if adapter_path is None:
        return spec
    if not isinstance(adapter_path, str | os.PathLike) or not str(adapter_path).strip():
        hint = " A list goes into the spec, as 'adapter'." if isinstance(adapter_path, list | tuple) else ""
        raise SpecError(
            f"adapter_path must be the folder of a PEFT adapter, a hub id or None; found {shown(adapter_path)}.{hint}"
        )
    adapters = (*spec.adapters[:-1], adapter_path)
    return replace(spec, adapter=adapters, adapter_revision=None, adapter_subfolder=None)


def _answers_identity(answers: Mapping[str, Any] | str | Path | None) -> Hashable:
    if not isinstance(answers, Path):
        return answers if answers is None else str(answers)
    return (str(answers), _file_digest(str(answers), _stats((str(answers),))))


def look_at_adapter(spec: ModelSpec) -> Hashable:
    """Return the state of the files of a spec's only adapter. The next key of this spec takes over what was seen.

    Looking at files is most of a warm request, so each request looks once.
    """
    signature = _adapter_signature(str(spec.adapter))
    object.__setattr__(spec, "_seen", signature)
    return signature


def forget_look(spec: ModelSpec) -> None:
    """Let the next key of a spec look at its adapter's files itself: they may have changed since the last look."""
    object.__setattr__(spec, "_seen", None)


def adapter_digest(spec: ModelSpec) -> str | None:
    """Return a digest of the contents of a spec's adapters, equal on every machine; ``None`` where there is none."""
    return _adapters_digest(spec)


_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 2**14


def weights_digest(model: Path) -> str | None:
    """Return a digest of a model's weights, equal on every machine; ``None`` where there are none, or none to read.

    It is of each file's name and size and of 64 samples of its bytes, since to read all would take as long as a load.
    Training changes most of the weights, so two models differ in nearly all samples.

    Args:
        model: A folder, or a GGUF file.
    """
    paths = [model] if model.is_file() else sorted(model.glob("model*.safetensors"))
    files = tuple(map(str, paths)) or _listed(str(model), _WEIGHTS)
    return _sampled_digest(files, _stats(files)) if files else None


@lru_cache(maxsize=256)
def _sampled_digest(files: tuple[str, ...], _signature: _Signature) -> str | None:
    """A digest of samples of some files; they are read again only when their signature has changed."""
    digest = hashlib.sha256()
    try:
        for path in files:
            with open_regular(path) as file:
                size = file.seek(0, os.SEEK_END)
                name = GGUF_SUFFIX if path.endswith(GGUF_SUFFIX) else os.path.basename(path)
                digest.update(f"{name}\0{size}\0".encode())
                for at in range(_SAMPLES):
                    file.seek(size * at // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError:
        return None
    return digest.hexdigest()


_Signature: TypeAlias = tuple[tuple[int, int, int, int], ...]
_IDENTITY_FILES: Final = re.compile(
    r".*\.(safetensors|jinja|model|txt)|(?!trainer_state).*\.json|(adapter_model|new_embeddings).*\.bin"
)
"""Files that decide what an adapter's folder loads; a checkpoint's optimizer state and README do not."""


def _model_signature(model: str, files: re.Pattern[str] = _WEIGHTS) -> _Signature | None:
    """The state of the files that a local model is loaded from; their contents are too large to read."""
    if not os.path.isabs(model):
        return None
    if model.endswith(GGUF_SUFFIX):
        return _stats((model,))
    return _stats((f"{model}/config.json", *_listed(model, files)))


def _model_identity(model: str) -> Hashable:
    """The part of the key that tells states of a local model apart.

    Each request checks config.json and the weights. The other files are checked when the folder has changed, because a
    file was added, replaced or removed, and after `look_again`. Checking all files each time would take twice as long.
    It is done for a model with folders inside its own, since a change in these does not show in the folder itself.
    """
    if not _is_folder(model):
        return _model_signature(model)
    try:
        folder = os.stat(model)
        looked_at, inner, others = _model_folder(model, folder.st_mtime_ns, folder.st_ino)
    except OSError:
        return _model_signature(model)
    if inner:
        others = _stats(_files(model, _MODEL_FILES, folder.st_mtime_ns, folder.st_ino, _stats(inner)))
    return _stats(looked_at), others


@lru_cache(maxsize=256)
def _is_folder(model: str) -> bool:
    """Whether a model is named by a folder, not by a hub id or a GGUF file."""
    return os.path.isabs(model) and not model.endswith(GGUF_SUFFIX)


def look_again() -> None:
    """Check all files of local models again at the next request, since a program may have written to them."""
    _model_folder.cache_clear()


@lru_cache(maxsize=256)
def _model_folder(model: str, mtime_ns: int, inode: int) -> tuple[tuple[str, ...], tuple[str, ...], _Signature]:
    """The files and the inner folders to check each time, and the state of other files when the folder last changed."""
    inner = _inner_folders(model, mtime_ns, inode)
    inside = _stats(inner)
    looked_at = (f"{model}/config.json", *_files(model, _WEIGHTS, mtime_ns, inode, inside))
    return looked_at, inner, _stats(_files(model, _MODEL_FILES, mtime_ns, inode, inside))


def _adapter_signature(folder: str) -> _Signature:
    """The state of the files that an adapter is loaded from."""
    return _stats(_listed(folder, _IDENTITY_FILES))


def _listed(folder: str, names: re.Pattern[str]) -> tuple[str, ...]:
    """The paths of a folder's files with matching names; none if there is no such folder."""
    try:
        listed = os.stat(folder)
        inner = _inner_folders(folder, listed.st_mtime_ns, listed.st_ino)
        return _files(folder, names, listed.st_mtime_ns, listed.st_ino, _stats(inner) if inner else ())
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
"""The folder in which transformers keeps named chat templates, inside a tokenizer's folder."""
_POOLING: Final = "_Pooling"
"""How the names of the folders end in which sentence-transformers keeps how a model pools (``config.json``)."""


@lru_cache(maxsize=256)
def _files(folder: str, names: re.Pattern[str], mtime_ns: int, inode: int, _inside: _Signature) -> tuple[str, ...]:
    """Cached until the modification time of the folder, or of a folder in it, changes."""
    with os.scandir(folder) as entries:
        found = [e.path for e in entries if e.is_file() and names.fullmatch(e.name)]
    inner = map(Path, _inner_folders(folder, mtime_ns, inode))
    inside = [path for each in inner for path in each.glob("*.jinja" if each.name == _TEMPLATES else "config.json")]
    return (*sorted(found), *sorted(map(str, inside)))


@lru_cache(maxsize=256)
def _inner_folders(folder: str, _mtime_ns: int, _inode: int) -> tuple[str, ...]:
    """The folders inside a model's or an adapter's that hold files of it; a file added there changes only theirs."""
    with os.scandir(folder) as entries:
        return tuple(e.path for e in entries if e.is_dir() and (e.name == _TEMPLATES or e.name.endswith(_POOLING)))


_MOST_DIGESTED: Final = 2**30
"""Bytes that are hashed in a second or two; most adapters have far fewer."""


@lru_cache(maxsize=256)
def _file_digest(path: str, signature: _Signature) -> str:
    """A digest of a file's content, read again only when its signature has changed.

    For a file above `_MOST_DIGESTED` bytes, the signature itself is used, as for a model's files.
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
    """A digest of the contents of an adapter's files, read again only when their signature has changed."""
    if not signature:
        return None
    digest = hashlib.sha256()
    for path in _listed(folder, _IDENTITY_FILES):
        digest.update(f"{os.path.basename(path)}\0{_file_digest(path, _stats((path,)))}".encode())
    return digest.hexdigest()
