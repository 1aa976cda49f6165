"""Adapters whose effect is checked by their logits: any effect counts, but rounding does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import AdapterMismatchError
from tests.tiny import edit_weights, make_adapter, make_base, quiet
from tests.unit.backends.hf.families import make_family
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family(tmp_path_factory.mktemp("gpt2"), "gpt2")


def _one_token(tensors: dict[str, Any]) -> None:
    """Reduce an adapter of embeddings to its effect on the last token."""
    for name, tensor in tensors.items():
        if "lora_embedding_A" in name:
            tensor[:, :-1] = 0


def test_an_adapter_that_changes_the_embedding_of_one_token_is_accepted(build: Any, base: Path, tmp_path: Path) -> None:
    with quiet():
        adapter = make_adapter(tmp_path, base, targets=("embed_tokens",))
    with build(base, edit_weights(adapter, _one_token)).as_finetuned() as view:
        assert not view_logits(view, "; the sun").equal(logits(*fresh(base), "; the sun"))


def test_an_adapter_that_changes_biases_alone_is_accepted(build: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", attention_bias=True)
    with quiet():
        adapter = make_adapter(tmp_path / "adapter", base, zero_b=True, bias="all")
    edit_weights(adapter, lambda tensors: {n: t + 1 if n.endswith("bias") else t for n, t in tensors.items()})
    with build(base, adapter).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, adapter)))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_untrained_start_is_known_in_half_precision(build: Any, tmp_path: Path, start: str) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    with quiet():
        adapter = make_adapter(tmp_path / "adapter", base, zero_b=True, init_lora_weights=start)
    with pytest.raises(AdapterMismatchError, match=r"changes nothing .* its weights are those that PEFT starts with"):
        build(base, adapter, dtype="bf16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_little_training_is_an_effect(build: Any, base: Path, tmp_path: Path, dtype: str) -> None:
    with quiet():
        adapter = make_adapter(tmp_path, base, scale=1e-4, init_lora_weights="pissa")
    with build(base, adapter, dtype=dtype).as_finetuned() as view:
        assert not view_logits(view).equal(logits(*fresh(base, dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype])))


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("target", ["c_attn", "c_proj", "wte", "lm_head"])
def test_dora_that_was_never_trained_is_refused_whichever_way_its_weights_lie(
    build: Any, gpt2: Path, tmp_path: Path, target: str
) -> None:
    with quiet():
        adapter = make_adapter(
            tmp_path / "adapter", gpt2, targets=(target,), zero_b=True, use_dora=True, fan_in_fan_out=target[1] == "_"
        )
    edit_weights(adapter, lambda tensors: {n: t for n, t in tensors.items() if "lora_" in n})
    with pytest.raises(AdapterMismatchError, match=r"changes nothing .* Was it saved before it was trained"):
        build(gpt2, adapter)
