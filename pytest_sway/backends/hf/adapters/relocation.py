"""Finds the places of an adapter that was trained on another class of its base.

The text model of a multimodal base has other names in each class that loads it, which `lora_fit` lists. So an
adapter may name its layers after another class than the loaded one. If all names that the loaded class lacks begin in
one such way, and go on with a part of the loaded text model, only that part can be meant.

Then the adapter's configuration names its modules one by one: ``target_modules = ["q_proj"]`` means other modules in a
class that has a vision tower, too.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.checkpoints.lora_fit import BODIES, HEADS
from pytest_sway.backends.checkpoints.peft_adapter import ROOT
from pytest_sway.backends.hf.sharing.trees import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles

__tracebackhide__ = True

_OF_BASE: Final = ("weight", "bias")
_OF_TOKENS: Final = ("token_adapter", "trainable_tokens_delta")
_SELECTING: Final = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that select among the modules that ``target_modules`` describes."""


class _Place(NamedTuple):
    """Where a model has its text model.

    Attributes:
        body: The name of its body, with a dot.
        head: The name of its output layer, with a dot.
        parts: The names of the body's parts.
    """

    body: str
    head: str
    parts: frozenset[str]


def relocated(model: Any, files: AdapterFiles) -> AdapterFiles:
    """Return an adapter's files with the names that its layers have in a model.

    Args:
        model: The Hugging Face model that the adapter is put on.
        files: The adapter's files.
    """
    lacking = list(_lacking(model, files.entries or ()))
    place = _place(model) if lacking else None
    moves = {} if place is None else _moves(lacking, place)
    if not moves:
        return files
    renamed = {ROOT + name: ROOT + _moved(name, moves) for name in lacking}
    entries = {renamed.get(name, name): entry for name, entry in (files.entries or {}).items()}
    if place is None or len(entries) < len(files.entries or ()):
        return files
    moved = replace(files, entries=entries, renamed=renamed, config=_with_ranks(files, moves))
    if all(name.startswith((ROOT + place.body, ROOT + place.head)) for name in entries if name.startswith(ROOT)):
        return replace(moved, config=_by_name(model, moved, place, moves))
    return moved


def _lacking(model: Any, names: Iterable[str]) -> Iterator[str]:
    """Yield the names of tensors, without PEFT's prefix, that begin with no part of a model."""
    parts = {
        part if grandchild is None else f"{part}.{grandchild}"
        for part, child in model.named_children()
        for grandchild in [name for name, _ in child.named_children()] or [None]
    }
    for name in names:
        place = name.removeprefix(ROOT)
        first, _, rest = place.partition(".")
        if place != name and not {first, f"{first}.{rest.partition('.')[0]}"} & parts:
            yield place


def _place(model: Any) -> _Place | None:
    names = {id(module): name for name, module in modules_of(model)}
    try:
        first, head = (names.get(id(each)) for each in (model.get_input_embeddings(), model.get_output_embeddings()))
    except (AttributeError, NotImplementedError):  # a model with its own code may not name them
        return None
    body = (first or "").rpartition(".")[0]
    if not body or head is None:
        return None
    return _Place(f"{body}.", f"{head}.", frozenset(name for name, _ in model.get_submodule(body).named_children()))


def _moves(lacking: Iterable[str], place: _Place) -> dict[str, str]:
    """Return by what each beginning of these names is replaced; nothing if a name or a beginning is unknown."""
    moves: dict[str, str] = {}
    for name in lacking:
        bodies = (body for body in BODIES if name.startswith(body))
        body = next((each for each in bodies if name.removeprefix(each).partition(".")[0] in place.parts), None)
        head = next((each for each in HEADS if name.startswith(each)), None)
        if body is not None:
            moves[body] = place.body
        elif head is not None:
            moves[head] = place.head
        else:
            return {}
    return moves if list(moves.values()).count(place.body) <= 1 else {}


def _moved(name: str, moves: Mapping[str, str]) -> str:
    before = next((each for each in sorted(moves, key=len, reverse=True) if name.startswith(each)), None)
    return name if before is None else moves[before] + name.removeprefix(before)


def _with_ranks(files: AdapterFiles, moves: Mapping[str, str]) -> Mapping[str, Any]:
    """Return an adapter's configuration, in which AdaLoRA has the rank of each layer by the name of a tensor."""
    ranks = files.config.get("rank_pattern")
    if files.peft_type != "ADALORA" or not ranks:
        return files.config
    return {**files.config, "rank_pattern": {_moved(name, moves): kept for name, kept in ranks.items()}}


def _by_name(model: Any, files: AdapterFiles, place: _Place, moves: Mapping[str, str]) -> dict[str, Any]:
    """Return an adapter's configuration with the full names of the modules that it changes.

    Args:
        model: The model that it is put on.
        files: Its files, with the tensors' names in the model.
        place: Where the model has its text model.
        moves: By what the beginnings of its tensors' names were replaced.
    """
    config = dict(files.config)
    modules = {name for name, _ in modules_of(model)}
    before = {now: old for old, now in moves.items()}
    targets = {module: _moved(module, before) for module in _targets(files, modules)}
    if targets and isinstance(config.get("target_modules"), str | list):
        config |= {"target_modules": list(targets)} | {name: None for name in _SELECTING if name in config}
    ahead = config.get("feedforward_modules")
    if isinstance(ahead, str | list):
        config["feedforward_modules"] = [now for now, old in targets.items() if _matches(ahead, old)]
    for field in ("rank_pattern", "alpha_pattern") if files.peft_type != "ADALORA" else ():
        if patterns := config.get(field):
            found = {now: _by_pattern(patterns, old) for now, old in targets.items()}
            config[field] = {re.escape(now): patterns[key] for now, key in found.items() if key is not None}
    if saved := config.get("modules_to_save"):
        ours = sorted(name for name in modules if f"{name}.".startswith((place.body, place.head)))
        config["modules_to_save"] = [
            name for name in ours if name.endswith(tuple(_moved(f"{each}.", moves)[:-1] for each in saved))
        ]
    if isinstance(tokens := config.get("trainable_token_indices"), dict):
        config["trainable_token_indices"] = {_moved(name, moves): ids for name, ids in tokens.items()}
    if parameters := config.get("target_parameters"):
        config["target_parameters"] = [_moved(name, moves) for name in parameters]
    return config


def _targets(files: AdapterFiles, modules: set[str]) -> list[str]:
    """Return the modules that an adapter's own layers are put on."""
    wrapped = tuple(f".{name}".rpartition(".")[0] for name in files.config.get("target_parameters") or ())
    found = dict.fromkeys(
        module
        for name in files.entries or ()
        for module, rest in [_split(name.removeprefix(ROOT), modules)]
        if rest not in _OF_BASE and (files.peft_type == "TRAINABLE_TOKENS" or not rest.startswith(_OF_TOKENS))
    )
    return [module for module in found if not (wrapped and f".{module}".endswith(wrapped))]


def _split(name: str, modules: set[str]) -> tuple[str, str]:
    """Return the longest beginning of a tensor's name that is a module's, and the rest."""
    parts = name.split(".")
    end = next((end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in modules), 0)
    return ".".join(parts[:end]), ".".join(parts[end:])


def _matches(pattern: str | list[str], module: str) -> bool:
    return bool(re.fullmatch(pattern, module)) if isinstance(pattern, str) else module.endswith(tuple(pattern))


def _by_pattern(patterns: Iterable[str], module: str) -> str | None:
    """Return the pattern that PEFT takes for a module; ``None`` if it takes none."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
