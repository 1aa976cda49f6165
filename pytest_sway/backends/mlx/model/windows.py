"""Sliding windows: what transformers' class attends to, and whether mlx-lm's class for the same weights does so too."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.mlx.model.libraries import mlx_lm_module
from pytest_sway.errors import BackendLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__tracebackhide__ = True


def fit_windows(model: Any, config: Mapping[str, Any]) -> int | None:
    """Give a model the sliding window of its configuration, and return how long a text it computes right.

    Args:
        model: A model of mlx-lm; changed in place.
        config: The fields of its config.json.

    Raises:
        BackendLoadError: Transformers cannot read them, or mlx-lm's class has windows in other layers. Such classes
            have other rotary embeddings in these layers, so that short texts would be wrong, too.

    Returns:
        The most tokens for which it attends to the same ones as transformers' class; ``None`` for any number.
    """
    try:
        windows = _windows_of(config)
    except Exception as error:  # those of huggingface_hub's checks have no class in common with others
        raise BackendLoadError(
            f"transformers cannot read the config.json of the base, so its sliding window is unknown: {error}"
        ) from error
    if windows is None:
        return None
    _apply_windows(model, windows)
    pairs = list(zip(windows, _own_windows(model), strict=False))  # the last layers may share the others' caches
    theirs, own = ([index for index, pair in enumerate(pairs) if pair[side]] for side in (0, 1))
    if theirs and own and theirs != own:
        raise BackendLoadError(
            f"mlx-lm's {config['model_type']} would use a sliding window in other layers of the base ({own}) than its"
            f" configuration says ({theirs}). Use kind='hf'."
        )
    return min((size for pair in pairs if pair[0] != pair[1] for size in pair if size), default=None)


def _windows_of(config: Mapping[str, Any]) -> list[int | None] | None:
    """Return how many tokens each layer of transformers' class attends to, or the size of its chunks.

    Args:
        config: The fields of a config.json.

    Returns:
        One number for each layer, ``None`` for a layer that attends to all tokens; ``None`` if transformers has no
        class for this type of model, so that mlx-lm's is the only one.
    """
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    text = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).get_text_config()
    window, chunk = _declared(text, "sliding_window"), _declared(text, "attention_chunk_size")
    every = "sliding_attention" if window else "chunked_attention"
    kinds = _declared(text, "layer_types") or [every] * text.num_hidden_layers
    sizes = {"sliding_attention": window, "chunked_attention": chunk}
    return [sizes.get(kind) or None for kind in kinds]


def _apply_windows(model: Any, windows: Sequence[int | None]) -> None:
    """Give a model of mlx-lm's Llama class, which Mistral is loaded as, a window in all layers.

    The constructor of that class wants one layer without a window, so ``layer_types`` cannot say this.
    """
    if not isinstance(model, mlx_lm_module("models.llama").Model) or None in windows or len(set(windows)) != 1:
        return
    model.model.sliding_window, model.model.swa_idx = windows[0], 0
    for layer in model.layers:
        layer.use_sliding = True


def _declared(config: Any, name: str) -> Any:
    """The value of a field that a configuration's class knows: others are kept, too, but no model reads them."""
    its_class = type(config)
    name = its_class.attribute_map.get(name, name)
    known = hasattr(its_class, name) or name in inspect.signature(its_class.__init__).parameters
    return getattr(config, name, None) if known else None


def _own_windows(model: Any) -> list[int | None]:
    """How many tokens each layer of a model attends to, which shows in the key-value caches that it makes for them."""
    caches = mlx_lm_module("models.cache").make_prompt_cache(model)
    return [getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None) for cache in caches]
