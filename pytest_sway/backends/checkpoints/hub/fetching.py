"""Fetches an adapter from a hub into the hub's cache: the files that are needed, and those once.

The commit of a branch takes one request, that of a commit's own hash none. What a commit needs is asked for once and
noted in the cache, so that a complete snapshot is known to be complete without another request.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pytest_sway.backends.checkpoints.hub.refusals import HubAdapter, explained
from pytest_sway.backends.checkpoints.hub_files import WHILE_OFFLINE, is_offline
from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, PICKLED, WEIGHTS, only_pickled
from pytest_sway.errors import BackendNotAvailableError, WeightsError
from pytest_sway.spec.hub_names import HubName, hub_address
from pytest_sway.spec.paths import in_hub_cache
from pytest_sway.system.imports import import_apart
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded

if TYPE_CHECKING:
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_MLX_WEIGHTS: Final = "adapters.safetensors"
_TEMPLATES: Final = "additional_chat_templates"
_OF_TOKENIZERS: Final = re.compile(
    r"(config|tokenizer.*|special_tokens_map|added_tokens|vocab|tekken|chat_template)\.json"
    rf"|(vocab|merges)\.txt|.*\.(model|tiktoken|jinja)|{_TEMPLATES}/.*\.jinja"
)
_POOLING: Final = "_Pooling"
_OF_EMBEDDINGS: Final = re.compile(rf"(modules|(config_)?sentence_.*)\.json|[^/]*{_POOLING}/config\.json")
"""sentence-transformers' files, which decide how hidden states become an embedding."""
_NOTES: Final = ".pytest-sway"
"""The folder, in a repository's part of the hub's cache, of the notes on what each commit needs."""


class Fetched(NamedTuple):
    """An adapter that is on this machine.

    Attributes:
        folder: Its folder in the hub's cache.
        nbytes: How many bytes were fetched for it now, without its config; 0 if all was there.
    """

    folder: Path
    nbytes: int = 0


def adapter_on_hub(adapter: str, spec: ModelSpec) -> HubAdapter:
    """Return which adapter of a hub is meant by the name of one in a spec."""
    named = hub_address("adapter", adapter) or HubName(adapter)
    revision, subfolder = named.revision or spec.adapter_revision, named.subfolder or spec.adapter_subfolder
    return HubAdapter(named.repository, revision, subfolder, spec.allow_pickle, len(spec.adapters) == 1)


def fetch_adapter(asked: HubAdapter) -> Fetched:
    """Return where an adapter is on this machine, fetched if need be; offline, nothing is fetched.

    Raises:
        SpecError: There is no such repository, revision or folder; it holds no adapter; or the hub wants a login.
        WeightsError: It is not in the cache and this process is offline, or has its weights only as a pickle.
        BackendLoadError: It could not be fetched this time.
        BackendNotAvailableError: huggingface_hub is not installed.
    """
    try:
        import_apart("huggingface_hub")
    except ImportError:
        raise BackendNotAvailableError(
            f"fetching {asked} needs huggingface_hub, which this environment lacks. Install it with: pip install"
            " 'pytest-sway[hf]'"
        ) from None
    with explained(asked):
        return _fetched(asked)


def _fetched(asked: HubAdapter) -> Fetched:
    from huggingface_hub import hf_hub_download

    folder = Path(hf_hub_download(asked.repository, asked.path(CONFIG), revision=asked.revision)).parent
    cached = in_hub_cache(str(folder))
    assert cached is not None
    note = _note(asked, folder, cached.commit)
    needed = _noted(note)
    if needed is not None and all((folder / name).exists() for name in needed):
        return Fetched(folder)
    if is_offline():
        _require_weights(asked, folder)
        return Fetched(folder)
    needed = _needed(asked, cached.commit)
    missing = [name for name in needed if not (folder / name).exists()]
    for name in missing:
        hf_hub_download(asked.repository, asked.path(name), revision=cached.commit)
    _write(note, needed)
    return Fetched(folder, sum((folder / name).stat().st_size for name in missing))


def _needed(asked: HubAdapter, commit: str) -> list[str]:
    """The files of an adapter's folder that its load needs, by what the hub says is there."""
    names = _listed(asked, commit, asked.subfolder)
    for folder in [name for name in names if name == asked.path(_TEMPLATES) or name.endswith(_POOLING)]:
        names |= _listed(asked, commit, folder)
    names = {name[len(asked.path("")) :] for name in names}
    weights = {WEIGHTS, _MLX_WEIGHTS} & names or {PICKLED} & names
    if PICKLED in weights and not asked.allow_pickle:
        raise only_pickled(str(asked))
    return sorted(
        name
        for name in names
        if name in {CONFIG, *weights} or _OF_TOKENIZERS.fullmatch(name) or _OF_EMBEDDINGS.fullmatch(name)
    )


def _listed(asked: HubAdapter, commit: str, folder: str | None) -> set[str]:
    from huggingface_hub import HfApi

    return {entry.path for entry in HfApi().list_repo_tree(asked.repository, folder, revision=commit)}


def _require_weights(asked: HubAdapter, folder: Path) -> None:
    """Raise unless the cache has an adapter's weights; which other files belong to it is not known offline."""
    if not any((folder / name).exists() for name in (WEIGHTS, _MLX_WEIGHTS, PICKLED)):
        raise WeightsError(
            f"{asked} is in this machine's cache of the hub without its weights, and {WHILE_OFFLINE}, or name the"
            " folder of an adapter."
        )


# --- the note on what a commit needs ----------------------------------------------------------------------------------


def _note(asked: HubAdapter, folder: Path, commit: str) -> Path:
    depth = 0 if asked.subfolder is None else asked.subfolder.count("/") + 1
    return folder.parents[depth + 1].joinpath(_NOTES, commit, asked.path("needed.json"))


def _noted(note: Path) -> list[str] | None:
    try:
        names = json.loads(read_bounded(note, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _write(note: Path, needed: list[str]) -> None:
    with suppress(OSError):  # the cache may be somebody else's: the next run asks again
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(needed), "utf-8")
