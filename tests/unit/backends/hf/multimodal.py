"""Makes a tiny model of each multimodal class that pytest-sway asks for text, and adapters for it.

`python -m tests.unit.backends.hf.multimodal` writes the classes as a table to
`docs/pages/reference/multimodal.md`, and a test compares.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.tiny import WORDS, make_tokenizer, quiet, save_noise, save_tiny
from tests.unit.backends.hf.families import EXPERTS, LINEAR, TEXT, VISION
from tests.unit.backends.hf.zoo import TRANSFORMERS_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = Path(__file__).parents[4] / "docs" / "pages" / "reference" / "multimodal.md"
_TABLE: Final = re.compile(r"(<!-- the classes -->\n).*?(<!-- end -->)", re.DOTALL)

_THREE_AXES: Final = {"rope_type": "default", "type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_MROPE: Final[dict[str, Any]] = {**TEXT, "rope_scaling": _THREE_AXES, "rope_parameters": _THREE_AXES}
_CLIP: Final[dict[str, Any]] = {**VISION, "model_type": "clip_vision_model"}
_UNTIED: Final = {"tie_word_embeddings": False}
_DEEPSTACK: Final[dict[str, Any]] = {**VISION, "deepstack_visual_indexes": [0]}
_PLACEHOLDERS: Final = ("<image>", "<video>", "<vision>", "</vision>")
_QWEN: Final = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_INDEX: Final = ("image_token_index",)


@dataclass(frozen=True)
class Specimen:
    """One multimodal class.

    Attributes:
        name: Its type in a ``config.json``.
        class_name: The name of the class.
        models: Well-known models of it, for the table.
        text: Fields of its text model's configuration.
        vision: Fields of its vision tower's.
        placeholders: Fields of its configuration for the tokens in `_PLACEHOLDERS`.
        fields: Further fields of its configuration.
        targets: ``target_modules`` of an adapter that is trained on it.
        byte_level: Whether transformers reads its tokenizer in byte-level BPE, whatever its files say.
        loaded_as: The name of the class that pytest-sway loads instead.
        since: The first version of transformers in which it is causal.
    """

    name: str
    class_name: str
    models: str
    text: dict[str, Any]
    vision: dict[str, Any]
    placeholders: tuple[str, ...] = _INDEX
    fields: dict[str, Any] = field(default_factory=dict)
    targets: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    byte_level: bool = False
    loaded_as: str = ""
    since: tuple[int, int] = (4, 56)

    def __str__(self) -> str:
        return self.name

    @property
    def is_known(self) -> bool:
        """Whether the installed transformers has the class."""
        import transformers

        return hasattr(transformers, self.class_name) and self.since <= TRANSFORMERS_VERSION


SPECIMENS: Final = (
    Specimen("qwen2_vl", "Qwen2VLForConditionalGeneration", "Qwen2-VL", _MROPE, VISION, _QWEN),
    Specimen("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2.5-VL", _MROPE, VISION, _QWEN),
    Specimen("qwen3_vl", "Qwen3VLForConditionalGeneration", "Qwen3-VL", _MROPE, _DEEPSTACK, _QWEN),
    Specimen(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3-VL with experts",
        {**_MROPE, **EXPERTS},
        _DEEPSTACK,
        _QWEN,
    ),
    Specimen("qwen3_5", "Qwen3_5ForConditionalGeneration", "Qwen3.5", LINEAR, VISION, _QWEN, byte_level=True),
    Specimen(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3.5 with experts",
        {**LINEAR, **EXPERTS},
        VISION,
        _QWEN,
        byte_level=True,
    ),
    Specimen("gemma3", "Gemma3ForConditionalGeneration", "Gemma 3", TEXT, VISION, fields={"mm_tokens_per_image": 4}),
    Specimen(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        "Gemma 4",
        {
            **TEXT,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 128,
        },
        {**VISION, "head_dim": 16, "global_head_dim": 16},
        ("image_token_id", "video_token_id"),
        {"audio_config": None},
        r".*language_model.*\.(q_proj|v_proj)",  # PEFT cannot change the layers of its vision tower
    ),
    Specimen("llava", "LlavaForConditionalGeneration", "Llava", {**TEXT, "model_type": "llama"}, _CLIP, fields=_UNTIED),
    Specimen(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "Mistral Small 3.1 and later",
        {**TEXT, "model_type": "mistral"},
        {**VISION, "model_type": "pixtral", "head_dim": 16},
    ),
    Specimen(
        "llama4",
        "Llama4ForConditionalGeneration",
        "Llama 4",
        {**TEXT, "attention_chunk_size": 16, "intermediate_size_mlp": 64, "num_local_experts": 4},
        VISION,
        loaded_as="Llama4ForCausalLM",
        since=(5, 0),
    ),
)


KNOWN: Final = [specimen for specimen in SPECIMENS if specimen.is_known]
"""The classes that the installed transformers has; only these are tested."""


def make_multimodal(folder: Path, specimen: Specimen, **text: Any) -> Path:
    """Save a random model of a class, with a tokenizer, to ``folder``; equal arguments give equal weights.

    Args:
        folder: The folder, created if needed.
        specimen: The class.
        text: Fields of the text model's configuration that override the specimen's.
    """
    import transformers

    model_class: Any = getattr(transformers, specimen.class_name)
    make = _make_byte_level if specimen.byte_level else make_tokenizer
    vocab = make(folder, extra=_PLACEHOLDERS)
    tokens = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    ids = range(vocab - len(_PLACEHOLDERS), vocab)
    with quiet():
        config = model_class.config_class(
            text_config={**specimen.text, **tokens, **text},
            vision_config=dict(specimen.vision),
            **dict(zip(specimen.placeholders, ids, strict=False)),
            **specimen.fields,
        )
    return save_tiny(lambda: model_class(config), folder)


def _make_byte_level(folder: Path, *, extra: tuple[str, ...]) -> int:
    """Save a tokenizer in byte-level BPE for the words of `WORDS` to ``folder`` and return its vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([f" {word}" for word in WORDS], trainer)
    tokenizer.add_special_tokens(list(extra))
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    fast: Any = PreTrainedTokenizerFast
    with quiet():
        fast(tokenizer_object=tokenizer, model_max_length=256, **names).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def plain_model(folder: Path, specimen: Specimen, **loaded: Any) -> Any:
    """Return a model as transformers loads it, frozen, in the class that pytest-sway takes.

    Args:
        folder: Its folder.
        specimen: Its class.
        loaded: Further arguments for the load.
    """
    import torch
    import transformers

    with quiet():
        model_class: Any = getattr(transformers, specimen.loaded_as or specimen.class_name)
        model = model_class.from_pretrained(folder, dtype=torch.float32, **loaded)
    return model.eval().requires_grad_(False)


def text_model(model: Any) -> tuple[str, Any]:
    """Return the name and the module of a model's text model, without its output layer."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings).rpartition(".")[0]
    return name, model.get_submodule(name)


def text_alone(model: Any) -> Any | None:
    """Return the causal language model with the text model's weights; ``None`` if transformers has no such class."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = model.config.get_text_config()
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known:
        return None
    auto: Any = AutoModelForCausalLM
    with quiet():
        alone = auto.from_config(config).to(torch.float32)
    text_model(alone)[1].load_state_dict(text_model(model)[1].state_dict())
    alone.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    return alone.eval().requires_grad_(False)


@contextlib.contextmanager
def with_adapter(model: Any, folder: Path) -> Iterator[Any]:
    """Yield a ``PeftModel``: the model, with an adapter that PEFT loads."""
    from peft import PeftModel

    with quiet():
        loaded: Any = PeftModel.from_pretrained(model, str(folder))
    try:
        yield loaded.eval()
    finally:
        _taken_off(loaded)


def train(model: Any, folder: Path, kind: str = "LoraConfig", **fields: Any) -> Path:
    """Save an adapter of noise, trained on a model, which is as it was afterwards.

    Args:
        model: The model.
        folder: The folder, created if needed.
        kind: The name of the adapter's configuration in PEFT.
        fields: Its fields.
    """
    import peft

    if kind == "LoraConfig":
        fields = {"r": 2, "target_modules": ["q_proj", "v_proj"]} | fields
    config: Any = getattr(peft, kind)(task_type="CAUSAL_LM", **fields)
    _taken_off(save_noise(lambda: model, config, folder))
    return folder


def _taken_off(peft_model: Any) -> None:
    if hasattr(peft_model.base_model, "unload"):  # prompts are no layers
        peft_model.unload()


def table() -> str:
    """Return the table of `docs/pages/reference/multimodal.md`."""
    lines = ["| models | `model_type` | class that is loaded |", "| --- | --- | --- |"]
    rows = ((each.models, f"`{each.name}`", f"`{each.loaded_as or each.class_name}`") for each in SPECIMENS)
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def page() -> str:
    """Return `docs/pages/reference/multimodal.md` with the current table."""
    return _TABLE.sub(lambda match: match[1] + table() + "\n" + match[2], PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(page())
