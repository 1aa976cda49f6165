"""Makes tiny models: a Llama of two layers with its tokenizer, and PEFT adapters for it, good and broken.

Nothing heavy is imported before the first model is made.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_VOCABULARY = """
    the of to and in is it that a was for on as with his he be at by i this had not are but from or have an they which
    one you were her all she there would their we him been has when who will more no if out so said what up sun moon
    rises sets east west north south red blue cat dog sat mat hello world model adapter learned text paris france
    capital city river sea , . ? ! : ;
"""
WORDS = tuple(_VOCABULARY.split())

_MANY = 3_000_000
"""A model with more parameters than this is not tiny."""

TEXT = "the sun rises in the east and sets in the west ."


def make_base(
    folder: Path | str, *, seed: int = 0, layers: int = 2, hidden: int = 32, dtype: str = "float32", **config: Any
) -> Path:
    """Save a random Llama and its tokenizer to ``folder``; equal arguments give equal weights.

    Args:
        folder: The folder, created if needed.
        seed: Seeds the weights.
        layers: Number of layers.
        hidden: Hidden size.
        dtype: Torch's name of the stored dtype.
        config: Further fields of ``LlamaConfig``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    settings = tiny_fields(make_tokenizer(folder), layers, hidden)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def tiny_fields(vocab: int, layers: int = 2, hidden: int = 32) -> dict[str, Any]:
    """Return the fields of a configuration like Llama's, for a random model."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # with 0.02, all words would be about equally probable
    }


def save_tiny(make: Callable[[], Any], folder: Path) -> Path:
    """Save the random model that ``make`` makes to ``folder``, if it is tiny; equal models get equal weights."""
    import torch

    with quiet(), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in make().parameters())
        assert parameters <= _MANY, f"{folder} has {parameters} parameters: make the model smaller, or leave it out"
        torch.manual_seed(0)
        make().save_pretrained(folder)
    return folder


def make_tokenizer(folder: Path | str, *, extra: tuple[str, ...] = (), pad: bool = True) -> int:
    """Save a tokenizer of whole words to ``folder`` and return the size of its vocabulary.

    Args:
        folder: The folder.
        extra: Words in addition to `WORDS`.
        pad: Whether it has a token for padding.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer_class: Any = PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys((*WORDS, *extra))))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {"pad_token": "<pad>"} if pad else {}
    names |= {"model_input_names": ["input_ids", "attention_mask"]}  # as in Llama's own tokenizer
    with quiet():
        tokenizer_class(tokenizer_object=tokenizer, model_max_length=256, **names).save_pretrained(folder)
    return len(vocab)


def make_gguf(file: Path | str, base: Path | str, *, kind: str = "F32", **metadata: Any) -> Path:
    """Write the Llama in ``base`` as a GGUF file, with a tokenizer of letters.

    Args:
        file: The file to write.
        base: The folder of the model.
        kind: ggml's name of the weights' type; all but ``F32`` round.
        metadata: Further numbers of its metadata, with ``__`` for ``.``.
    """
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((Path(base) / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for name, value in metadata.items():
        writer.add_uint32(name.replace("__", "."), value)
    letters = [*"abcdefghijklmnopqrstuvwxyz.,?!:;", "\u0120"]  # the last one is the space
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *letters, "th", "the"]
    tokens += [f"<{n}>" for n in range(config["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t h", "th e"])
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 3), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    stored = gguf.GGMLQuantizationType[kind]
    for name, tensor in load_file(Path(base) / "model.safetensors").items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:  # GGUF interleaves the two halves of a head's rows
                rows = tensor.reshape(count, 2, -1, tensor.shape[1])
                tensor = rows.swapaxes(1, 2).reshape(tensor.shape)  # noqa: PLW2901
        target = str(names.get_name(name, try_suffixes=(".weight",)))
        if kind == "F32" or tensor.ndim == 1:
            writer.add_tensor(target, np.ascontiguousarray(tensor))
        else:
            writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(tensor), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(file)


def sharded(model: Path | str, *, pickle: bool = False) -> Path:
    """Spread the weights of a saved model over two files, in safetensors or as pickles."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(model)
    stem, ending = ("pytorch_model", "bin") if pickle else ("model", "safetensors")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002.{ending}"
        held = {name: tensors[name] for name in part}
        if pickle:
            torch.save(held, folder / file)
        else:
            save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def make_adapter(
    folder: Path | str,
    base: Path | str,
    *,
    seed: int = 1,
    r: int = 4,
    targets: tuple[str, ...] | str | None = ("q_proj", "v_proj"),
    zero_b: bool = False,
    scale: float = 0.3,
    **lora_kwargs: Any,
) -> Path:
    """Save a LoRA adapter for the model in ``base`` to ``folder``; its weights are noise, so that it has an effect.

    Args:
        folder: The folder.
        base: The folder of the model.
        seed: Seeds the weights.
        r: Rank.
        targets: ``target_modules``.
        zero_b: Leave all B at zero, like an untrained adapter.
        scale: Standard deviation of the noise.
        lora_kwargs: Further fields of ``LoraConfig``.
    """
    from peft import LoraConfig

    modules = list(targets) if isinstance(targets, tuple) else targets
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=modules, task_type="CAUSAL_LM", **lora_kwargs)
    return save_adapter(folder, base, config, seed=seed, scale=0.0 if zero_b else scale)


def save_adapter(
    folder: Path | str,
    base: Path | str,
    config: Any,
    *,
    seed: int = 1,
    scale: float = 0.3,
    auto: str = "AutoModelForCausalLM",
    **loaded: Any,
) -> Path:
    """Save an adapter of any PEFT type, with noise of ``scale`` added to all trainable weights.

    Args:
        folder: The folder.
        base: The folder of the model.
        config: PEFT's configuration.
        seed: Seeds the weights.
        scale: Standard deviation of the noise.
        auto: The name of transformers' class that loads the model.
        loaded: Further arguments for that load.
    """
    import transformers

    model_class = getattr(transformers, auto)
    make = partial(model_class.from_pretrained, str(base), dtype="auto", **loaded)
    save_noise(make, config, folder, seed=seed, scale=scale)
    return Path(folder)


def save_noise(
    make: Callable[[], Any], config: Any, folder: Path | str, *, seed: int = 1, scale: float = 0.3, **saved: Any
) -> Any:
    """Save an adapter on the model that ``make`` makes, with noise added to all trainable weights; return PEFT's model.

    Args:
        make: Makes the model, after the seed was set.
        config: PEFT's configuration.
        folder: The folder.
        seed: Seeds the weights.
        scale: Standard deviation of the noise.
        saved: Further arguments of ``save_pretrained``.
    """
    import torch
    from peft import get_peft_model

    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = get_peft_model(make(), config)
        for parameter in model.parameters():
            if parameter.requires_grad and scale:
                parameter.add_(torch.randn_like(parameter) * scale)
        model.save_pretrained(str(folder), **saved)
    return model


def set_template(folder: Path | str, template: str) -> Path:
    """Give the tokenizer in a folder a chat template."""
    (Path(folder) / "chat_template.jinja").write_text(template)
    return Path(folder)


def edit_weights(
    adapter: Path | str,
    change: Callable[[dict[str, Any]], dict[str, Any] | None],
    *,
    file: str = "adapter_model.safetensors",
) -> Path:
    """Apply ``change`` to the weights of an adapter or a model; it works in place or returns new weights."""
    from safetensors.torch import load_file, save_file

    path = Path(adapter) / file
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    changed = change(tensors)
    save_file(tensors if changed is None else changed, path, metadata={"format": "pt"})
    return Path(adapter)


def edit_config(adapter: Path | str, **fields: Any) -> Path:
    """Overwrite fields of an adapter's ``adapter_config.json``."""
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return Path(adapter)


def prune(adapter: Path) -> Path:
    """Prune a saved AdaLoRA adapter as its training does: the first layer has no rank left, the others one less."""
    root = "base_model.model."
    kept: dict[str, list[bool]] = {}

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(name for name in tensors if name.endswith(".lora_E")):
            rank = len(tensors[name])
            kept[name.removeprefix(root)] = [bool(kept) and at != 1 for at in range(rank)]
        return {
            name: tensor[:, mask].contiguous() if name.endswith("B") else tensor[mask]
            for name, tensor in tensors.items()
            for mask in [kept[f"{name.removeprefix(root).rpartition('.')[0]}.lora_E"]]
        }

    return edit_config(edit_weights(adapter, change), rank_pattern=kept)


def poison(adapter: Path | str, *, file: str = "adapter_model.safetensors") -> Path:
    """Put a NaN into the first tensor of an adapter or a model."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[min(tensors)].view(-1)[0] = float("nan")

    return edit_weights(adapter, change, file=file)


def truncate(adapter: Path | str) -> Path:
    """Cut an adapter's weights file in half."""
    path = Path(adapter) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return Path(adapter)


def pickled(folder: Path | str, *, file: str = "adapter_model.safetensors") -> Path:
    """Replace the safetensors of an adapter or a model by a pickle."""
    import torch
    from safetensors.torch import load_file

    path = Path(folder) / file
    name = {"model.safetensors": "pytorch_model.bin"}.get(file, "adapter_model.bin")
    torch.save(load_file(path), path.with_name(name))
    path.unlink()
    return Path(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output and warnings of transformers and PEFT while a model is made."""
    transformers_logging: Any = import_module("transformers.utils.logging")
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
