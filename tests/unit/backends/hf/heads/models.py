"""Makes tiny models with heads, and adapters for them; computes what transformers and PEFT make of them, one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import WORDS, make_tokenizer, quiet, save_adapter

TEXTS = [
    "the sun rises in the east",
    "the cat sat on the mat .",
    "hello world",
    "the capital of france is paris , and the river is the sea ! the sun sets in the west .",
    "no",
]

_MODULES = "sentence_transformers.models."
_SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "longt5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        "init_std": 0.2,
    },
}
_SIZES["mt5"] = _SIZES["umt5"] = _SIZES["t5"]
_SIZES["mbart"] = _SIZES["plbart"] = _SIZES["bart"]
_SIZES["led"] = {
    **_SIZES["bart"],
    "attention_window": 4,
    "max_encoder_position_embeddings": 128,
    "max_decoder_position_embeddings": 128,
}
_SIZES["fsmt"] = {
    **_SIZES["bart"],
    "langs": ["en", "de"],
    "src_vocab_size": len(WORDS) + 4,
    "tgt_vocab_size": len(WORDS) + 4,
}


def make_model(folder: Path, kind: str, auto: str, *, seed: int = 0, ends: bool = False, **config: Any) -> Path:
    """Save a random model and a tokenizer.

    Args:
        folder: The folder.
        kind: The type of the model, one of `_SIZES`.
        auto: The name of transformers' class that makes it of a config.
        seed: Seeds the weights.
        ends: Whether the tokenizer puts the end token after a text, as those of T5 and BART do.
        config: Further fields of its config.
    """
    import torch
    import transformers

    tokens: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    fields = {"vocab_size": make_tokenizer(folder), "initializer_range": 0.2} | tokens | _SIZES[kind] | config
    if ends:
        _end_texts(folder)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = transformers.AutoConfig.for_model(kind, **fields)
        model = getattr(transformers, auto).from_config(made)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms, too, so that nothing is left out
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder)
    return folder


def _end_texts(folder: Path) -> None:
    from tokenizers import Tokenizer, processors

    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    template: Any = processors.TemplateProcessing
    tokenizer.post_processor = template(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)])
    tokenizer.save(path)


def make_sentence_model(
    folder: Path, mode: str | list[str] = "mean_tokens", *, modules: tuple[str, ...] = ("Normalize",), **files: Any
) -> Path:
    """Write sentence-transformers' configuration into a model's or an adapter's folder.

    Args:
        folder: The folder.
        mode: The names of its pooling, as in ``pooling_mode_<name>``.
        modules: What comes after the pooling.
        files: ``bert`` and ``transformers``: the contents of its other two files; ``pooling``: more of the pooling's;
            ``longest``: the most tokens of a text, in the tokenizer's file, as sentence-transformers 5.4 saves it.
    """
    names = ["Transformer", "Pooling", *modules]
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": _MODULES + name}
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    every = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    pooling = {f"pooling_mode_{name}": name in mode if isinstance(mode, list) else name == mode for name in every}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling | files.get("pooling", {})))
    for name, key in (("sentence_bert_config.json", "bert"), ("config_sentence_transformers.json", "transformers")):
        if key in files:
            (folder / name).write_text(json.dumps(files[key]))
    if "longest" in files:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": files["longest"]}))
    return folder


def make_head_adapter(
    folder: Path, base: Path, auto: str, task_type: str | None, *, targets: Any = None, seed: int = 1, **fields: Any
) -> Path:
    """Save a LoRA adapter that was trained on a model with a head.

    Args:
        folder: The folder.
        base: The folder of the model.
        auto: The name of transformers' class that loads the model.
        task_type: PEFT's name of the task.
        targets: The modules that it changes.
        seed: Seeds its weights.
        fields: ``num_labels`` of the model, and further fields of ``LoraConfig``.
    """
    from peft import LoraConfig

    loaded = {"num_labels": fields.pop("num_labels")} if "num_labels" in fields else {}
    modules = targets or ["q_proj", "v_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type=task_type, **fields)
    return save_adapter(folder, base, config, seed=seed, auto=auto, **loaded)


def fresh_model(base: Path, auto: str, *adapters: Path, **loaded: Any) -> tuple[Any, Any]:
    """Load a model and its tokenizer as transformers and PEFT do, with adapters put on; all but the last merged."""
    import transformers
    from peft import PeftModel

    with quiet():
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base)
        model = getattr(transformers, auto).from_pretrained(base, dtype="float32", **loaded)
        for number, adapter in enumerate(adapters, start=1):
            model = PeftModel.from_pretrained(model, str(adapter))
            model = model if number == len(adapters) else model.merge_and_unload()
    return model.eval(), tokenizer


def one_by_one(model: Any, tokenizer: Any, texts: list[Any]) -> list[list[float]]:
    """Return a model's logits for each text or pair of texts, in a pass for each."""
    import torch

    found = []
    for text in texts:
        inputs = tokenizer(*(text if isinstance(text, tuple) else (text,)), return_tensors="pt")
        with torch.inference_mode():
            found.append(model(**inputs).logits[0].tolist())
    return found
