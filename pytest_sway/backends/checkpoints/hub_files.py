"""Where the files of a base are on this machine: in its folder, or in the hub's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sway.errors import SpecError, WeightsError
from pytest_sway.spec.paths import is_path
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


def base_file(spec: ModelSpec, name: str) -> Path | None:
    """Return the path of a file of the base, or ``None`` if it is not on this machine; nothing is downloaded."""
    if is_path(spec.base):
        path = Path(spec.base, name)
        return path if path.is_file() else None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(spec.base, name, revision=spec.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """Return what the base's ``config.json`` says; empty if it is not on this machine.

    Raises:
        SpecError: It is no JSON object.
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
    """Raise if a model of a hub is not on this machine in a process that asks no hub for anything.

    Raises:
        WeightsError: Loading it would fail, with a word about the connection.
    """
    if is_path(spec.base) or base_file(spec, "config.json") is not None:
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        revision = "" if spec.revision is None else f" in revision {spec.revision!r}"
        raise WeightsError(
            f"the {role} {spec.base!r} is no folder in {os.getcwd()!r} and not in this machine's cache of the"
            f" hub{revision}, and this run is offline (--sway-offline, sway_offline or HF_HUB_OFFLINE). Run once"
            " online, or name the folder of a model."
        )


def require_complete(spec: ModelSpec, missing: Collection[str], why: str = "") -> None:
    """Raise unless a load found all of a model's weights: transformers makes up, from noise, what is missing.

    Args:
        spec: What was loaded.
        missing: The names of the weights that were missing, as ``from_pretrained`` tells.
        why: More about it, as the end of a sentence.

    Raises:
        WeightsError: Some are missing.
    """
    if missing:
        raise WeightsError(
            f"the files of {spec.base!r} lack {len(missing)} of the model's weights ({some(missing)}), which would be"
            f" noise{why}. Copy or save the model again: config.json and model.safetensors together, or the .gguf file."
        )


def adapter_inside(spec: ModelSpec, role: str = "base") -> SpecError:
    """Return the error for a model that is, or contains, an adapter: transformers would put it on without a word."""
    this = "it" if is_path(spec.base) else f"the folder to which 'hf download {spec.base}' fetches it"
    if role != "base":
        return SpecError(
            f"the {role} {spec.base!r} holds an adapter (adapter_config.json), so it is not a whole model. Name {this}"
            " as 'adapter'; or, if the model is there too, move the adapter's files out of its folder."
        )
    return SpecError(
        f"the base {spec.base!r} holds an adapter (adapter_config.json), which transformers would put on, so it is not"
        f" the base alone. Name the model that the adapter was trained on as 'base', and {this} as 'adapter'; or move"
        " the adapter's files out of the model's folder."
    )
