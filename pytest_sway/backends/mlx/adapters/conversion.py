"""Convert PEFT's LoRA adapters to mlx-lm's layers where that is exact, and say why where it is not."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.checkpoints.peft_types import PLAIN_INITIALISATIONS
from pytest_sway.errors import AdapterMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles

__tracebackhide__ = True

# Fields of a LoraConfig that are converted, or that don't affect what a trained adapter adds to its base.
_CONVERTED: Final = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
        "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
        "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
        "use_dora", "use_rslora",
    }
)  # fmt: skip
_SAYING_NOTHING: Final[tuple[Any, ...]] = (None, False, "", "none", [], {})

_FACTOR: Final = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_COPY: Final = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")
_MAGNITUDE: Final = re.compile(r"base_model\.model\.(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
"""PEFT also loads tensors whose names contain its adapter's name, ``default``."""


class Pair(NamedTuple):
    """One module's pair of LoRA matrices in a PEFT adapter.

    Attributes:
        tensors: The names of its tensors in the file, by their names in mlx-lm's layer.
        embedding: Whether the module is an embedding.
        rank: The rank of its matrices.
        scale: The factor of their product.
    """

    tensors: Mapping[str, str]
    embedding: bool
    rank: int
    scale: float


def refuse_inexact(files: AdapterFiles) -> None:
    """Raise unless mlx-lm's layers compute an adapter of PEFT exactly.

    Raises:
        AdapterMismatchError: They do not; the message says why.
    """
    why = _why_inexact(files.config)
    if why is not None:
        raise inexact(files.folder, why)


def inexact(folder: Path, why: str) -> AdapterMismatchError:
    """Return the error for an adapter of PEFT that cannot be converted exactly."""
    return AdapterMismatchError(
        f"the adapter {str(folder)!r} of PEFT cannot be converted to MLX exactly: {why}. Use kind='hf' for it."
    )


def copied_from_base(name: str) -> str | None:
    """Return the base's name of a tensor that PEFT saved a copy of; ``None`` for other names.

    PEFT saves the weights of embeddings and of the output layer if they have LoRA matrices.
    """
    match = _COPY.fullmatch(name)
    return None if match is None or "lora_" in name else f"{match[1]}.weight"


def _why_inexact(config: Mapping[str, Any]) -> str | None:
    if config["peft_type"] != "LORA":
        return f"mlx-lm has no layers for the type {config['peft_type']}"
    if config.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        return f"its initialisation {config['init_lora_weights']!r} rewrites the base's own weights"
    if config.get("bias", "none") != "none":
        return f"it brings biases (bias={config['bias']!r})"
    for name, value in config.items():
        if name not in _CONVERTED and value not in _SAYING_NOTHING:
            return f"mlx-lm's LoRA layers have nothing for {name}={value!r}"
    return None


def pairs_of(files: Any) -> tuple[dict[str, Pair], list[str]]:
    """Return the LoRA matrices of a PEFT adapter by module, and the names of all other tensors."""
    found: dict[str, dict[str, str]] = {}
    embeddings, others = set(), []
    for name in files.entries:
        factor, magnitude = _FACTOR.fullmatch(name), _MAGNITUDE.fullmatch(name)
        if factor:
            found.setdefault(factor[1], {})[f"lora_{factor[3].lower()}"] = name
            if factor[2]:
                embeddings.add(factor[1])
        elif magnitude:
            found.setdefault(magnitude[1], {})["m"] = name
        else:
            others.append(name)
    pairs = {}
    for module, tensors in found.items():
        rank, scale = _rank_and_scale(files.config, module)
        pairs[module] = Pair(tensors, module in embeddings, rank, scale)
    return pairs, others


def _rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """A module's rank and scale, by PEFT's rule: the first pattern that matches the end of its name wins."""
    rank = _matching(config.get("rank_pattern"), module, config["r"])
    alpha = _matching(config.get("alpha_pattern"), module, config["lora_alpha"])
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def as_mlx(name: str, tensor: Any) -> Any:
    """Return a PEFT tensor in mlx-lm's form: matrices transposed, all in float32, in which PEFT computes them.

    Args:
        name: Its name in mlx-lm's layer.
        tensor: The tensor, as an array of MLX.
    """
    import mlx.core as mx

    return (tensor.reshape(-1) if name == "m" else tensor.T).astype(mx.float32)
