"""Reads how hidden states become an embedding, from a model's sentence-transformers configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.checkpoints.hub.refusals import file_not_fetched
from pytest_sway.backends.checkpoints.hub_files import base_file, is_known_to_lack, is_offline
from pytest_sway.errors import SpecError
from pytest_sway.spec.paths import is_path
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

POOLINGS: Final = ("mean", "cls", "last", "max")
_MODES: Final = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
    "lasttoken": "last",
}
"""sentence-transformers' names; a configuration sets the first ones to true, or names one as ``pooling_mode``."""


class Pooling(NamedTuple):
    """How a model makes an embedding of a text.

    Attributes:
        mode: What makes one vector of hidden states; ``None`` if that is unknown.
        normalize: Whether the vector is divided by its length.
        max_length: The most tokens of a text; ``None`` for what the model reads.
        prompt: What comes before each text.
        lower: Whether the text is written in small letters first.
        why: Why the mode is unknown, as the beginning of a sentence.
    """

    mode: str | None
    normalize: bool = False
    max_length: int | None = None
    prompt: str = ""
    lower: bool = False
    why: str = ""


def pooling_of_base(spec: ModelSpec) -> Pooling | None:
    """Return what the files of a spec's base say; ``None`` if they have no such configuration."""
    return _read(lambda name: _file_of_base(spec, name), spec.base)


def pooling_of_folder(folder: Path) -> Pooling | None:
    """Return what an adapter's folder says; ``None`` if it has no such configuration."""
    return _read(lambda name: path if (path := folder / name).is_file() else None, str(folder))


def _read(find: Callable[[str], Path | None], source: str) -> Pooling | None:
    modules = _json(find("modules.json"))
    if not isinstance(modules, list):
        return None
    kinds = [(_kind(str(each.get("type", ""))), each.get("path", "")) for each in map(_fields, modules)]
    others = sorted({kind for kind, _ in kinds} - {"Transformer", "Pooling", "Normalize"})
    paths = [path for kind, path in kinds if kind == "Pooling"]
    pooling = _fields(_json(find(f"{paths[0]}/config.json"))) if len(paths) == 1 else {}
    said, text = (
        _fields(_json(find(name))) for name in ("config_sentence_transformers.json", "sentence_bert_config.json")
    )
    prompt = _fields(said.get("prompts")).get(str(said.get("default_prompt_name")))
    longest, modes, why = text.get("max_seq_length"), _modes(pooling), ""
    if others:
        why = f"{source!r} has the module {', '.join(others)} in its modules.json, which pytest-sway does not compute"
    elif len(modes) != 1 or modes[0] not in POOLINGS:
        why = f"{source!r} pools by {' and '.join(modes) or 'nothing'} in its sentence-transformers configuration"
    elif prompt and pooling.get("include_prompt") is False:
        why = f"{source!r} leaves its prompt out of the pooling, which pytest-sway does not"
    return Pooling(
        None if why else modes[0],
        any(kind == "Normalize" for kind, _ in kinds),
        longest if isinstance(longest, int) and longest > 0 else None,
        str(prompt or ""),
        bool(text.get("do_lower_case")),
        why,
    )


def _kind(module: str) -> str:
    """Return the name of sentence-transformers' class; a class of the model's own code keeps its full name."""
    return module.rpartition(".")[2] if module.startswith("sentence_transformers.") else module


def _modes(config: Mapping[str, Any]) -> list[str]:
    said = config.get("pooling_mode")
    if said is None:
        said = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    return [_MODES.get(str(name), str(name)) for name in (said if isinstance(said, list) else [said])]


def _fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return json.loads(read_bounded(path, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{str(path)!r} cannot be read as JSON: {error}. Save the model again.") from error


def _file_of_base(spec: ModelSpec, name: str) -> Path | None:
    """Return the path of a base's file, ``None`` if it has none.

    One on a hub is fetched, since transformers does not need it. Offline, what is not in the cache is not there.

    Raises:
        BackendLoadError: The hub could not be asked for it.
    """
    found = base_file(spec, name)
    if found is not None or is_path(spec.base) or is_offline() or is_known_to_lack(spec, name):
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(spec.base, name, revision=spec.revision))
    except Exception as error:  # a hub can fail in any way
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise file_not_fetched(spec, name, error) from error
