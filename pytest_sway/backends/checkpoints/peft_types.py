"""Facts about PEFT's types of adapters: which leave their base exact, which rewrite it, and which are refused.

`docs/pages/reference/adapters.md` has the table; `tests/unit/backends/hf/zoo.py` has a specimen of each row, on which
the tests rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__tracebackhide__ = True

LOCAL_LORA_FIELDS: Final = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
        "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type",
        "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
        "task_type", "use_dora", "use_rslora",
    }
)  # fmt: skip
"""Fields of a ``LoraConfig`` that leave the base's weights and other adapters unchanged, whatever their value."""

RESTORABLE_LORA_FIELDS: Final = frozenset({"modules_to_save", "trainable_token_indices"})
"""Fields of a ``LoraConfig`` with which the base is exact once the adapter is disabled."""

UNWRITING_LORA_FIELDS: Final = RESTORABLE_LORA_FIELDS | {
    "alora_invocation_tokens", "bias", "ensure_weight_tying", "layer_replication", "monteclora_config",
    "target_parameters", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
"""Fields of a ``LoraConfig`` with which loading writes no weight of the base, except those in the adapter's file."""

PLAIN_INITIALISATIONS: Final = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` with which loading writes no weight of the base."""

ADDITIVE_TYPES: Final = {
    "ADALORA": "lora_",
    "ADAMSS": "adamss_",
    "BEFT": "beft_",
    "BOFT": "boft_",
    "C3A": "c3a_",
    "DEFT": "deft_",
    "DELORA": "delora_",
    "FOURIERFT": "fourierft_",
    "GLORA": "glora_",
    "GRALORA": "gralora_",
    "HIRA": "hira_",
    "HRA": "hra_",
    "IA3": "ia3_",
    "LILY": "lily_",
    "LN_TUNING": "ln_tuning_layers",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "LORA": "lora_",
    "MISS": "miss_",
    "OFT": "oft_",
    "PEANUT": "peanut_",
    "PSOFT": "psoft_",
    "PVERA": "pvera_",
    "RANDLORA": "randlora_",
    "ROAD": "road_",
    "SHIRA": "shira_",
    "SUPERTUNING": "supertuning_",
    "TINYLORA": "tinylora_",
    "TRAINABLE_TOKENS": "trainable_tokens",
    "UNILORA": "unilora_",
    "VBLORA": "vblora_",
    "VERA": "vera_",
    "WAVEFT": "waveft_",
}
"""Types whose layers do all of their work and equal the base's, bit for bit, when disabled; and a part of their
tensors' names.

A type without a row is served too, but through the ``PeftModel`` and padded, which makes four completions of a prompt
of 200 tokens 3.5 times as slow with LOHA; and its estimated size includes a base of its own.
"""

UNWRITING_TYPES: Final = frozenset({*ADDITIVE_TYPES, "ADAPTION_PROMPT", "FROD", "OSF", "SHADOW"})
"""Types whose loading writes no weight of the base."""

PROMPT_TYPES: Final = frozenset(
    {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"}
)
"""Types that put something before the text and leave the model unchanged."""

UNMERGEABLE_TYPES: Final = PROMPT_TYPES | {"ADAPTION_PROMPT", "LILY", "SHADOW"}
"""Types that PEFT cannot merge into a base's weights."""

WHOLE_TEXT_TYPES: Final = frozenset({"LILY"})
"""Types whose layers look at a text as a whole, padding included, so that each text needs a pass of its own."""

_TASKS: Final = "it was trained for several tasks, and a prompt cannot say which one is meant"
_ELSEWHERE: Final = "it mixes adapters from other folders, which its spec does not name"
_UNKNOWN_BASE: Final = (
    "its training began by rewriting weights of the base with what it learned from data, which its folder does not have"
)
_IN_CONFIG: Final = " ({} in its adapter_config.json), which pytest-sway does not serve"
_REFUSED_TYPES: Final = {"MULTITASK_PROMPT_TUNING": _TASKS, "POLY": _TASKS, "XLORA": _ELSEWHERE}
_REFUSED_INITIALISATIONS: Final = {"corda": _UNKNOWN_BASE, "lora_ga": _UNKNOWN_BASE}
_WITH_PEFT: Final = "Test it with PEFT itself"
_CONVERT: Final = (
    "Convert it to plain LoRA where it was trained: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)


def unmergeable(config: Mapping[str, Any]) -> str | None:
    """Return why PEFT cannot merge an adapter into its base; ``None`` if it may be able to.

    Args:
        config: Its ``adapter_config.json``.
    """
    kind = config["peft_type"]
    if kind in UNMERGEABLE_TYPES:
        return f"it is of the type {kind} (peft_type in its adapter_config.json), which PEFT does not merge"
    fields = ("alora_invocation_tokens", "layer_replication")
    field = next((name for name in fields if kind == "LORA" and config.get(name)), None)
    return None if field is None else f"its adapter_config.json has {field}, with which PEFT does not merge"


def refusal(config: Mapping[str, Any]) -> str | None:
    """Return why an adapter is refused, and what to do; ``None`` if it can be served.

    Args:
        config: Its ``adapter_config.json``.
    """
    kind = config["peft_type"]
    if kind in _REFUSED_TYPES:
        return f"is of the type {kind}{_IN_CONFIG.format('peft_type')}: {_REFUSED_TYPES[kind]}. {_WITH_PEFT}"
    if kind != "LORA":
        return None
    if config.get("arrow_config"):
        return f"has an Arrow router{_IN_CONFIG.format('arrow_config')}: {_ELSEWHERE}. {_WITH_PEFT}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start in _REFUSED_INITIALISATIONS:
        where = "init_lora_weights in its adapter_config.json"
        why = _REFUSED_INITIALISATIONS[start]
        return f"was initialised by {start!r} ({where}) and is not converted: {why}. {_CONVERT}"
    return None
