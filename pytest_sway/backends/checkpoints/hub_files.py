"""Find the files of a base on this machine: in its folder, or in the hub's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.safetensors_header import shards_of
from pytest_sway.errors import SpecError, WeightsError
from pytest_sway.spec.paths import is_path
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
WHILE_OFFLINE: Final = "this run is offline (--sway-offline, sway_offline or HF_HUB_OFFLINE). Run once online"


def base_file(spec: ModelSpec, name: str) -> Path | None:
    """Return the path of a base's file, or ``None`` if it is not on this machine. Download nothing."""
    if is_path(spec.base):
        path = Path(spec.base, name)
        return path if path.is_file() else None
    found = _in_cache(spec, name)
    return Path(found) if isinstance(found, str) else None


def is_known_to_lack(spec: ModelSpec, name: str) -> bool:
    """Return whether a hub has once said that there is no such file of a base that is in its cache."""
    return not is_path(spec.base) and not isinstance(_in_cache(spec, name), str | None)


def _in_cache(spec: ModelSpec, name: str) -> object:
    """What a hub's cache has of a file: its path, an object where the hub has none, or ``None`` if that is unknown."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        return try_to_load_from_cache(spec.base, name, revision=spec.revision)
    except HFValidationError:
        return None


def missing_shard(spec: ModelSpec) -> str | None:
    """Return the name of a file of weights that a hub's base still lacks on this machine; ``None`` if there is none.

    transformers fetches the index of the files first and then one file after another, which takes minutes. Until all
    are there, a load goes on with the download.
    """
    index = base_file(spec, INDEX)
    if is_path(spec.base) or index is None or base_file(spec, SINGLE) is not None:
        return None
    try:
        return next((shard.name for shard in shards_of(index) if not shard.is_file()), None)
    except WeightsError:
        return None  # a broken index is reported where it is read


def is_offline() -> bool:
    """Return whether this process asks no hub for anything."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the base's ``config.json``; empty if it is not on this machine.

    Raises:
        SpecError: It is not a JSON object.
    """
    path = base_file(spec, "config.json")
    if path is None:
        return {}
    try:
        config: Any = json.loads(read_bounded(path, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{str(path)!r} cannot be read as JSON: {error}. Save the model again.") from error
    if not isinstance(config, dict):
        raise SpecError(f"{str(path)!r} is not a JSON object. Save the model again.")
    return config


def require_another(spec: ModelSpec, tuned: ModelSpec) -> None:
    """Raise if a spec's fine-tuned model is its base, and loaded in the same way.

    Raises:
        SpecError: It is.
    """
    same = tuned.base == spec.base and (is_path(spec.base) or spec.revision is None)
    if same and tuned.model_kwargs == spec.model_kwargs:
        other = " To compare two ways to load it, give 'finetuned_model_kwargs'." if spec.kind == "hf" else ""
        raise SpecError(
            f"the fine-tuned model {tuned.base!r} is the base itself, so a test of it would test nothing. Name the"
            f" model that it was fine-tuned from as 'base'.{other}"
        )


def require_cached(spec: ModelSpec, role: str = "base") -> None:
    """Raise if a hub's model, or a part of it, is not on this machine and this process is offline.

    Raises:
        WeightsError: It is not there; without this error, the load would fail with one about the connection.
    """
    if is_path(spec.base) or not is_offline():
        return
    revision = "" if spec.revision is None else f" in revision {spec.revision!r}"
    if base_file(spec, "config.json") is None:
        raise WeightsError(
            f"the {role} {spec.base!r} is neither a folder in {os.getcwd()!r} nor in this machine's cache of the"
            f" hub{revision}, and {WHILE_OFFLINE}, or name the folder of a model."
        )
    missing = missing_shard(spec)
    if missing is not None:
        raise WeightsError(
            f"the {role} {spec.base!r} is only in part in this machine's cache of the hub{revision}: {missing} is not"
            f" there, as after an interrupted download, and {WHILE_OFFLINE}, or name the folder of a model."
        )


def require_complete(spec: ModelSpec, missing: Collection[str], why: str = "") -> None:
    """Raise unless a load found all of a model's weights. transformers fills missing ones with noise.

    Args:
        spec: The loaded spec.
        missing: The names of missing weights, as ``from_pretrained`` reports them.
        why: An explanation, as the end of a sentence.

    Raises:
        WeightsError: Some are missing.
    """
    if missing:
        raise WeightsError(
            f"the files of {spec.base!r} lack {len(missing)} of the model's weights ({some(missing)}), which would"
            f" become noise{why}. Copy or save the model again: config.json and model.safetensors together, or the"
            " .gguf file."
        )


def adapter_inside(spec: ModelSpec, role: str = "base") -> SpecError:
    """Return the error for a model's folder with an adapter, which transformers would silently attach."""
    this = "it" if is_path(spec.base) else f"the folder that 'hf download {spec.base}' prints"
    if role != "base":
        return SpecError(
            f"the {role} {spec.base!r} holds an adapter (adapter_config.json), so it is not a whole model. Name {this}"
            " as 'adapter'; or, if the model is there too, move the adapter's files out of its folder."
        )
    return SpecError(
        f"the base {spec.base!r} holds an adapter (adapter_config.json), which transformers would attach, so it is not"
        f" the base alone. Name the model that the adapter was trained on as 'base', and {this} as 'adapter'; or move"
        " the adapter's files out of the model's folder."
    )
