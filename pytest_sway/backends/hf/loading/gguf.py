"""Loads models and tokenizers from GGUF files, with dequantized weights."""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.checkpoints.gguf_header import read_gguf
from pytest_sway.backends.checkpoints.hub_files import require_complete
from pytest_sway.backends.hf.loading.libraries import torch_dtype
from pytest_sway.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_OWN_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def load_gguf_model(spec: ModelSpec, path: Path, arguments: Mapping[str, Any]) -> Any:
    """Load the model of a GGUF file in a resolved spec's dtype, on the CPU. Call this in a `quiet_process`.

    Args:
        spec: The resolved spec.
        path: The file.
        arguments: What else ``from_pretrained`` takes.

    Raises:
        WeightsError: transformers cannot read the file, or it lacks some of the model's weights.
    """
    import transformers

    options = dict(arguments)
    if hasattr(transformers, "GgufConfig"):  # a newer transformers may keep the weights quantized
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _no_progress_bar(), _readable(path):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=torch_dtype(spec.dtype),
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    require_complete(spec, info["missing_keys"])
    _unmark_quantized(model)
    model.name_or_path = model.config.name_or_path = spec.base
    return model


def load_gguf_tokenizer(spec: ModelSpec, path: Path) -> Any:
    """Load a GGUF base's tokenizer: the folder's, if the spec names a folder that has one, else the file's."""
    from transformers import AutoTokenizer

    if str(path) != spec.base and any((path.parent / name).is_file() for name in _OWN_TOKENIZER):
        return AutoTokenizer.from_pretrained(str(path.parent), trust_remote_code=spec.trust_remote_code)
    with _readable(path):
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    _set_special_tokens(tokenizer, read_gguf(path).metadata)
    return tokenizer


def _set_special_tokens(tokenizer: Any, said: Mapping[str, Any]) -> None:
    """Set the special tokens that the file names; some versions of transformers assume Llama 2's."""
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = said.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and number != getattr(tokenizer, f"{role}_token_id"):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(number))
    # llama.cpp's rule: the file says whether a text begins with BOS. If it does not, SentencePiece texts do.
    begins = said.get("tokenizer.ggml.add_bos_token", said.get("tokenizer.ggml.model") == "llama")
    if getattr(tokenizer, "add_bos_token", begins) != begins:
        tokenizer.add_bos_token = begins
    tokenizer.clean_up_tokenization_spaces = False


def _unmark_quantized(model: Any) -> None:
    """Remove the marks of quantization: with them, transformers refuses to save a model read from GGUF."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for name in ("quantization_config", "_is_quantized"):
        vars(model.config).pop(name, None)
    model.config.transformers_version = metadata.version("transformers")  # as in a model that was saved and loaded


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        reader = f"transformers {metadata.version('transformers')}"
        raise WeightsError(
            f"{reader} cannot read the GGUF file {str(path)!r}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Disable the one progress bar in transformers that no setting turns off."""
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = reader.tqdm
    reader.tqdm = _only_iterate
    try:
        yield
    finally:
        reader.tqdm = bar


def _only_iterate(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    return iterable
