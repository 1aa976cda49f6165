"""Makes a tiny model of each family of causal language models in the installed transformers.

A family gets those `_SETTINGS` that its configuration has, and then its own. A family that is not small or correct with
these is excluded, with a reason.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, Final

from transformers import PretrainedConfig

from tests.tiny import make_tokenizer, quiet, save_tiny

if TYPE_CHECKING:
    from pathlib import Path

TEXT: Final[dict[str, Any]] = {
    "head_dim": 8,
    "hidden_size": 32,
    "initializer_range": 0.2,  # with 0.02, all tokens would be about equally probable
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "sliding_window": 8,
}
_SETTINGS: Final[dict[str, Any]] = {
    **TEXT,
    "is_decoder": True,
    # the same under other names
    "attention_heads": 4,
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "emb_dim": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "encoder_layers": 2,
    "ffn_dim": 64,
    "init_std": 0.2,
    "n_embd": 32,
    "n_head": 4,
    "n_heads": 4,
    "n_inner": 64,
    "n_layer": 2,
    "n_layers": 2,
    "n_positions": 256,
    "num_heads": 4,
    "num_layers": 2,
    # experts
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 32,
    "moe_topk": 2,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_mtp_layers": 0,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "topk_group": 1,
    "zero_expert_num": 2,
    # other kinds of attention
    "adapter_rank": 8,
    "attention_head_size": 8,
    "attention_window_size": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 8,
    "kv_channels": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 4,
    "sliding_window_size": 8,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "v_head_dim": 8,
    # recurrent states instead of attention
    "chunk_size": 8,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "mamba_chunk_size": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_groups": 1,
    "ssm_state_size": 8,
    "state_size": 8,
    "use_mamba_kernels": False,
    # scales of logits, which the head applies
    "final_logit_softcapping": 3.0,
    "logit_scale": 0.3,
    "logits_scaling": 3.0,
    # embeddings other than token embeddings
    "hidden_size_per_layer_input": 8,
    "pronunciation_embed_dim": 8,
    "pronunciation_vocab_size": 10,
    "shape_embed_dim": 8,
    "shape_vocab_size": 10,
    "type_vocab_size": 1,
    "vocab_size_per_layer_input": 128,
}

_KNOWN_TO_ALL: Final = () if dataclasses.is_dataclass(PretrainedConfig) else ("is_decoder",)
"""Settings that no signature shows before transformers 5."""

_HYBRID: Final[dict[str, Any]] = {"layer_types": ["linear_attention", "full_attention"]}
_CONVOLUTION: Final[dict[str, Any]] = {"layer_types": ["conv", "full_attention"]}
_LATENT: Final[dict[str, Any]] = {"num_key_value_heads": 4}
_ROPE: Final[dict[str, Any]] = {"rope_type": "default", "rope_theta": 1e4}
LINEAR: Final[dict[str, Any]] = {
    **TEXT,
    **_HYBRID,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS: Final[dict[str, Any]] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
VISION: Final[dict[str, Any]] = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "out_hidden_size": 32,
    "patch_size": 14,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
}

_OWN: Final[dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), _LATENT),
    **dict.fromkeys(("lara_mini", "olmo_hybrid", "qwen3_5_moe_text"), _HYBRID),
    **dict.fromkeys(("qwen3_5_text", "qwen3_next"), _HYBRID),
    **dict.fromkeys(("lfm2", "lfm3"), _CONVOLUTION),
    "bailing_hybrid": {**_LATENT, **_HYBRID},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "fuyu": {"text_config": {**TEXT, "model_type": "persimmon"}, "patch_size": 2, "image_size": 4},
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2_loop_text": {
        "unpadded_vocab_size": 64,
        "num_hidden_layers": 3,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_gate_rank": 4,
    },
    "inkling2_text": {"unpadded_vocab_size": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_LATENT, **_HYBRID},
    "lfm2_moe": {**_CONVOLUTION, "num_dense_layers": 1},
    "llama4": {
        "text_config": {**TEXT, "num_local_experts": 4, "intermediate_size_mlp": 64},
        "vision_config": VISION,
    },
    "mega": {"bidirectional": False},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen3_5": {"text_config": LINEAR, "vision_config": VISION},
    "qwen3_5_moe": {"text_config": {**LINEAR, **EXPERTS}, "vision_config": VISION},
    "qwen4_exp_text": {
        **_HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlm": {"causal": True},
    "xlnet": {"d_inner": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}

_MEDIA: Final = "its images or sounds make it large; its text model is a family of its own"
_DRAFTS: Final = "it drafts for another model, and computes nothing alone"
NOT_CAUSAL: Final = ("cpmant", "prophetnet", "xlnet")
"""Families whose "causal language model" in transformers is not causal."""

LEFT_OUT: Final[dict[str, str]] = {
    "blt": "its four configurations have no small sizes in common",
    **dict.fromkeys(("dots3_note", "emu3", "gemma4", "gemma4_unified", "git", "got_ocr2"), _MEDIA),
    **dict.fromkeys(("mllama", "moss_transcribe_diarize", "phi4_multimodal", "qwen4_exp"), _MEDIA),
    **dict.fromkeys(NOT_CAUSAL, "its tokens see later ones, so it is refused"),
    "gemma3n": "it needs Pillow",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "AutoModelForCausalLM cannot make it of its own configuration"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTS),
    "reformer": "it draws its hashes from torch's random numbers, which all threads share",
    "xlstm": "transformers cannot run it at this size",
}

LEFT_OUT_BEFORE_5: Final[dict[str, str]] = {
    "apertus": "transformers 4 cannot make it on the meta device",
    "dbrx": "transformers 4 has other names for its settings",
    "llama4": "transformers 4 makes it of its text model's configuration alone",
    **dict.fromkeys(("llama4_text", "xlm-prophetnet"), "in transformers 4 its tokens see later ones, so it is refused"),
    **dict.fromkeys(("qdqbert", "speech_to_text_2", "transfo-xl"), "transformers 4 lists it, and no longer runs it"),
}

_TARGETS: Final[dict[str, list[str]]] = {
    **{family: ["in_proj"] for family in ("falcon_mamba", "mamba", "mamba2", "nemotron_h")},
    **{family: ["q_proj", "v_proj"] for family in ("falcon_h1", "laguna", "llama4", "llama4_text", "phimoe")},
    "deepseek_v4": ["q_a_proj", "kv_proj"],
}
"""Target modules for families in which PEFT cannot save and reload an adapter on all linear layers."""


def families() -> list[str]:
    """Return the names of the families that can be made."""
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    left_out = {*LEFT_OUT, *(LEFT_OUT_BEFORE_5 if __version__ < "5" else ())}
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - left_out)


def targets_of(family: str) -> list[str] | str:
    """Return the target modules of a LoRA adapter for a family."""
    return list(_TARGETS[family]) if family in _TARGETS else "all-linear"


def make_family(folder: Path, family: str, **settings: Any) -> Path:
    """Save a random model of a family, with a tokenizer, to ``folder``; equal arguments give equal weights.

    Args:
        folder: The folder, created if needed.
        family: One of `families`.
        settings: Fields of its configuration that override the table.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config_class: Any = CONFIG_MAPPING[family]
    other_names = getattr(config_class, "attribute_map", {})
    known = {*inspect.signature(config_class).parameters, *other_names, *_KNOWN_TO_ALL}
    fields = {name: value for name, value in _SETTINGS.items() if name in known and other_names.get(name) not in known}
    tokens = {"vocab_size": make_tokenizer(folder), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model_class: Any = AutoModelForCausalLM
    with quiet():
        fields |= {**tokens, **_OWN.get(family, {}), **settings}
        if "text_config" in fields:
            fields["text_config"] = {**fields["text_config"], **tokens}
        config = config_class(**fields)
    return save_tiny(lambda: model_class.from_config(config), folder)
