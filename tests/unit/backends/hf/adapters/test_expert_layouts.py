"""Adapters on experts, which are modules in transformers 4 and one parameter for each layer in transformers 5.

The base's file has the names of transformers 4 in both, so the reference is a base with each expert's update added.
"""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_sway.errors import AdapterMismatchError, BackendLoadError, SwayWarning
from tests.tiny import edit_weights, make_adapter, make_tokenizer, quiet
from tests.unit.backends.hf.reference import fresh, logits, view_logits
from tests.unit.backends.hf.zoo import TRANSFORMERS_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FUSED = TRANSFORMERS_VERSION >= (5, 0)
MIXTRAL = ("w1", "w2", "w3")
QWEN = ("gate_proj", "up_proj", "down_proj")
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "phimoe": {"num_local_experts": 3},
    "olmoe": {"num_experts": 3},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "head_dim": 8},
    "qwen2_moe": {"num_experts": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that `make_moe` makes for a type."""
    made: dict[str, Path] = {}

    def _moe(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_moe(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return _moe


def make_moe(folder: Path, kind: str) -> Path:
    """Save a tiny model of a type, with three experts in each of two layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"vocab_size": make_tokenizer(folder), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    fields = {**sizes, **heads, **tokens, "initializer_range": 0.2, **SIZES[kind]}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto_class: Any = AutoModelForCausalLM
        auto_class.from_config(AutoConfig.for_model(kind, **fields)).save_pretrained(folder)
    return folder


class Made(NamedTuple):
    """An adapter, and the base with its updates added to the weights."""

    adapter: Path
    merged: Path


def adapter_on_experts(
    folder: Path,
    base: Path,
    leaves: tuple[str, ...],
    *,
    only: str = "",
    ranks: dict[str, int] | None = None,
    **config: Any,
) -> Made:
    """Write an adapter as PEFT does with transformers 4, for the modules of the base's file whose names end so."""
    import torch
    from safetensors.torch import load_file, save_file

    generator, tensors, r, alpha = torch.Generator().manual_seed(1), dict[str, Any](), 2, 4
    weights = load_file(base / "model.safetensors")
    for name, weight in list(weights.items()):
        module = name.removesuffix(".weight")
        leaf = module.rpartition(".")[2]
        if leaf not in leaves or only not in module or weight.ndim != 2:
            continue
        rank = (ranks or {}).get(leaf, r)
        a = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
        b = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        weights[name] = weight + alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * (b @ a)
    made = Made(folder / "adapter", shutil.copytree(base, folder / "merged"))
    made.adapter.mkdir()
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "rank_pattern": ranks or {}}
    fields |= {"target_modules": list(leaves), "base_model_name_or_path": str(base)} | config
    (made.adapter / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, made.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    save_file(weights, made.merged / "model.safetensors", metadata={"format": "pt"})
    return made


def _require_equal(found: Any, expected: Any) -> None:
    import torch

    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SERVED: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "Mixtral": ("mixtral", MIXTRAL, {}),
    "Mixtral, w2 alone": ("mixtral", ("w2",), {}),
    "Mixtral, the router and attention too": ("mixtral", (*MIXTRAL, "gate", "q_proj"), {}),
    "Mixtral, all-linear": ("mixtral", (*MIXTRAL, "gate", *ATTENTION), {"target_modules": "all-linear"}),
    "Mixtral, use_rslora": ("mixtral", MIXTRAL, {"use_rslora": True}),
    "Qwen3-MoE": ("qwen3_moe", QWEN, {}),
    "OLMoE": ("olmoe", (*QWEN, "v_proj"), {}),
    "Phi-MoE, attention alone": ("phimoe", ATTENTION, {}),
}


@pytest.mark.filterwarnings("default::pytest_sway.SwayWarning")
@pytest.mark.parametrize(("kind", "leaves", "config"), SERVED.values(), ids=SERVED)
def test_an_adapter_on_single_experts_computes_what_it_did_in_transformers_4(
    build: Any,
    moe: Callable[[str], Path],
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    kind: str,
    leaves: tuple[str, ...],
    config: dict[str, Any],
) -> None:
    base = moe(kind)
    made = adapter_on_experts(tmp_path, base, leaves, **config)
    backend = build(base, made.adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned, backend.as_scaled_adapter(0) as off:
        _require_equal(view_logits(tuned), logits(*fresh(made.merged)))
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(off).equal(view_logits(plain))
    told = [str(each.message) for each in recwarn if each.category is SwayWarning]
    assert len(told) == (FUSED and leaves != ATTENTION)
    assert all("has tensors of single experts (model.layers.0." in text for text in told)


@pytest.mark.skipif(not FUSED, reason="PEFT converts it for transformers 5")
@pytest.mark.filterwarnings("ignore::pytest_sway.SwayWarning")
def test_peft_alone_scales_w1_and_w3_of_mixtral_with_use_rslora_by_the_root_of_two(
    build: Any, moe: Callable[[str], Path], tmp_path: Path
) -> None:
    base = moe("mixtral")
    made = adapter_on_experts(tmp_path, base, MIXTRAL, use_rslora=True)

    def scale(tensors: dict[str, Any]) -> dict[str, Any]:
        both = [name for name in tensors if name.endswith(("w1.lora_B.weight", "w3.lora_B.weight"))]
        return tensors | {name: tensors[name] * math.sqrt(2) for name in both}

    scaled = edit_weights(shutil.copytree(made.adapter, tmp_path / "scaled"), scale)
    with build(base, scaled).as_finetuned() as tuned:
        _require_equal(view_logits(tuned), logits(*fresh(base, made.adapter)))


def test_it_can_be_merged_below_another_adapter(build: Any, moe: Callable[[str], Path], tmp_path: Path) -> None:
    base = moe("mixtral")
    made = adapter_on_experts(tmp_path, base, MIXTRAL)
    upper = make_adapter(tmp_path / "upper", base, targets=("q_proj",))
    if FUSED:
        with pytest.warns(SwayWarning, match="PEFT has converted them"):
            backend = build(base, [made.adapter, upper])
    else:
        backend = build(base, [made.adapter, upper])
    with backend.as_finetuned() as tuned:
        _require_equal(view_logits(tuned), logits(*fresh(made.merged, upper)))


REFUSED: dict[str, tuple[str, tuple[str, ...], dict[str, Any], str]] = {
    "w1 without w3": ("mixtral", ("w1",), {}, "without also targeting w3"),
    "one layer": (
        "mixtral",
        MIXTRAL,
        {"only": "layers.0", "target_modules": r".*layers\.0\..*\.(w1|w2|w3)"},
        "some tensors or places are left over",
    ),
    "one expert": (
        "mixtral",
        ("w2",),
        {"only": "experts.1", "target_modules": r".*experts\.1\.w2"},
        "not found in the base",
    ),
    "a rank of its own": ("mixtral", MIXTRAL, {"ranks": {"w1": 1}}, "has rank_pattern for single experts"),
    "use_rslora and ranks": (
        "mixtral",
        (*MIXTRAL, "q_proj"),
        {"use_rslora": True, "ranks": {"q_proj": 1}},
        "has use_rslora and rank_pattern",
    ),
    "Qwen2-MoE, a shared expert": ("qwen2_moe", QWEN, {}, "some tensors or places are left over"),
    "Phi-MoE": ("phimoe", MIXTRAL, {}, "not found in the base"),
}


@pytest.mark.parametrize(("kind", "leaves", "form", "why"), REFUSED.values(), ids=REFUSED)
def test_what_peft_does_not_convert_is_refused_with_what_to_do(
    build: Any,
    moe: Callable[[str], Path],
    tmp_path: Path,
    kind: str,
    leaves: tuple[str, ...],
    form: dict[str, Any],
    why: str,
) -> None:
    base = moe(kind)
    made = adapter_on_experts(tmp_path, base, leaves, **form)
    if not FUSED:
        with build(base, made.adapter).as_finetuned() as tuned:
            _require_equal(view_logits(tuned), logits(*fresh(made.merged)))
        return
    with pytest.raises(
        AdapterMismatchError, match=rf"PEFT does not convert this adapter \(.*{why}.*\)\. With"
    ) as caught:
        build(base, made.adapter)
    command = f"M.from_pretrained(B.from_pretrained('{base}'), '{made.adapter}').merge_and_unload().save_pretrained(f)"
    assert command in str(caught.value)
    assert "AutoModelForCausalLM as B" in str(caught.value)
    assert "Name the base" not in str(caught.value)


@pytest.mark.skipif(not FUSED, reason="transformers 4 serves it")
def test_the_command_loads_the_base_as_the_spec_does(build: Any, moe: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    made = adapter_on_experts(tmp_path, moe("mixtral"), ("w1",), task_type="SEQ_CLS", modules_to_save=["score"])
    edit_weights(made.adapter, lambda tensors: tensors | {"base_model.model.score.weight": torch.ones(3, 32)})
    with pytest.raises(AdapterMismatchError, match=r"AutoModelForSequenceClassification as B, .*', num_labels=3\)"):
        build(moe("mixtral"), made.adapter)


def test_an_adapter_on_all_experts_of_a_layer_needs_transformers_5(
    build: Any, moe: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    base, experts = moe("mixtral"), "base_model.model.model.layers.1.mlp.experts"
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": []}
    fields["target_parameters"] = ["layers.1.mlp.experts.down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    a, b = torch.full((6, 16), 0.1), torch.full((32, 6), 0.1)
    tensors = {f"{experts}.lora_A.weight": a, f"{experts}.lora_B.weight": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    if FUSED:
        with build(base, tmp_path).as_finetuned() as tuned:
            assert view_logits(tuned).equal(logits(*fresh(base, tmp_path)))
        return
    with pytest.raises(
        AdapterMismatchError, match=r"a module for each expert\. Upgrade: pip install 'transformers>=5'"
    ):
        build(base, tmp_path)


def test_experts_that_cannot_become_one_parameter_are_told_with_the_reason(
    build: Any, moe: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers 5 tells it only in its log."""
    folder = shutil.copytree(moe("mixtral"), tmp_path / "moe")

    def cut(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: each[:7].clone() if "experts.1.w1" in name else each for name, each in tensors.items()}

    edit_weights(folder, cut, file="model.safetensors")
    told = r"gate_up_proj cannot be converted: .*\[7, 32\]" if FUSED else r"have other sizes than its config\.json asks"
    with pytest.raises(BackendLoadError, match=told):
        build(folder)
