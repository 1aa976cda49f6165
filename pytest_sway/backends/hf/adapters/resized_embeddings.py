"""Resizes a base's embeddings to the vocabulary that an adapter was trained with, as PEFT's users do before a load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.peft_adapter import NAME
from pytest_sway.backends.hf.sharing.trees import modules_of
from pytest_sway.errors import AdapterMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles

__tracebackhide__ = True

_INSERTED: Final = frozenset({"base_layer", "modules_to_save", "original_module", "token_adapter", NAME})
"""Parts that PEFT inserts between a layer's name and its weight's."""
_WEIGHT: Final = ("weight",)
_SIDES: Final = {_WEIGHT: 0, ("lora_embedding_A",): -1, ("lora_B", "weight"): 0}
"""The axis that counts tokens, by the part of a tensor's name that follows the layer's."""


def fit_vocabulary(model: Any, files: AdapterFiles, tokenizer: Any, *, of_earlier: bool = False) -> None:
    """Resize a model's embeddings to the vocabulary that an adapter was trained with.

    transformers initialises new rows that the adapter does not have around the mean of the others.

    Args:
        model: A Hugging Face model, changed in place.
        files: The adapter's files.
        tokenizer: The adapter's tokenizer.
        of_earlier: Whether that is the one of an adapter before it in the spec's list.

    Raises:
        AdapterMismatchError: It trains a token that neither its weights nor the tokenizer have, or it has no embeddings
            for tokens that an earlier adapter has added.
    """
    layers = _layers(model)
    if not layers:
        return
    told = {size for name, layer in layers.items() for size in _sizes(files, name) if size != _vocabulary(layer)}
    rows = max(told, default=_vocabulary(next(iter(layers.values()))))
    last = max(trained_words(files), default=-1)
    if last >= rows:
        if last >= len(tokenizer):
            raise AdapterMismatchError(
                f"the adapter {str(files.folder)!r} trains the token {last:,}, but the model has {rows:,} embeddings"
                f" and the tokenizer {len(tokenizer):,} tokens. Put the tokenizer that the adapter was trained"
                " with into its folder."
            )
        rows = len(tokenizer)
    elif not told:
        return
    elif of_earlier and rows < len(tokenizer) <= max(map(_vocabulary, layers.values())):
        raise AdapterMismatchError(
            f"the adapter {str(files.folder)!r} has embeddings for {rows:,} tokens, but it is put on an adapter whose"
            f" tokenizer has {len(tokenizer):,}, so it was not trained on that one. Put the tokenizer that it was"
            " trained with into its folder, or name adapters that were trained one on the other."
        )
    brought = {id(layer.weight) for name, layer in layers.items() if _WEIGHT in dict(_tensors(files, name))}
    model.resize_token_embeddings(rows, mean_resizing=any(id(layer.weight) not in brought for layer in layers.values()))
    model.requires_grad_(False)


def _layers(model: Any) -> dict[str, Any]:
    """Return a model's embeddings and output layer, by the last part of their names."""
    try:
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # a model with its own code may not name them
        return {}
    names = {id(module): name.rpartition(".")[2] for name, module in modules_of(model)}
    return {names[id(layer)]: layer for layer in layers if id(layer) in names and _vocabulary(layer)}


def _vocabulary(layer: Any) -> int:
    return int(getattr(layer, "num_embeddings", None) or getattr(layer, "out_features", None) or 0)


def _sizes(files: AdapterFiles, layer: str) -> Iterator[int]:
    """Yield the vocabulary sizes of an adapter's tensors for a layer."""
    for rest, shape in _tensors(files, layer):
        if rest in _SIDES and len(shape) == 2:
            yield shape[_SIDES[rest]]


def _tensors(files: AdapterFiles, layer: str) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Yield the parts of the name after the layer's, and the shape, of each of an adapter's tensors for a layer."""
    for name, entry in (files.entries or {}).items():
        _, found, rest = f".{name}".rpartition(f".{layer}.")
        if found:
            yield tuple(part for part in rest.split(".") if part not in _INSERTED), entry.shape


def trained_words(files: AdapterFiles) -> list[int]:
    """Return the ids of the tokens that an adapter trains one by one."""
    told = files.config.get("trainable_token_indices") or files.config.get("token_indices")
    lists = told.values() if isinstance(told, dict) else [told]
    return [word for words in lists if isinstance(words, list) for word in words if isinstance(word, int)]
