"""Different forms of the same adapter: names in the keys of its weights, encodings of its config."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import AdapterMismatchError, SwayWarning
from tests.tiny import (
    edit_config,
    edit_weights,
    make_adapter,
    make_tokenizer,
    pickled,
    prune,
    quiet,
    save_adapter,
    save_tiny,
)
from tests.unit.backends.hf.mended import run_command_in
from tests.unit.backends.hf.reference import fresh, logits, view_logits
from tests.unit.backends.hf.zoo import PEFT_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def copied(tmp_path: Path, adapter: Path) -> Path:
    return shutil.copytree(adapter, tmp_path / "copied")


def _named(adapter: Path) -> Path:
    """Put PEFT's default adapter name into the keys of its weights."""
    return edit_weights(adapter, lambda ts: {n.replace(".weight", ".default.weight"): t for n, t in ts.items()})


@pytest.mark.skipif(PEFT_VERSION < (0, 21), reason="before, PEFT itself does not load such keys")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_keys_may_have_the_adapters_name_in_them(
    build: Any, base: Path, adapter: Path, copied: Path, beside: bool
) -> None:
    others = [build(base, adapter)] if beside else []
    backend = build(base, _named(copied))
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        expected = logits(*fresh(base, copied))
        assert expected.equal(logits(*fresh(base, adapter)))
        assert view_logits(tuned).equal(expected)
        assert view_logits(plain).equal(logits(*fresh(base)))
    assert [each.changes() for each in (backend, *others)] == [[]] * (1 + len(others))


def test_keys_with_the_adapters_name_are_compared_with_the_bases_sizes(build: Any, base: Path, copied: Path) -> None:
    edit_weights(_named(copied), lambda ts: {n: t[:, :16].clone() if "lora_A" in n else t for n, t in ts.items()})
    with pytest.raises(AdapterMismatchError, match=r"of its tensors have other sizes .*lora_A is for 16 features"):
        build(base, copied)


WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "a compiled base": lambda name: name.replace("model.model.", "model._orig_mod.model."),
    "DataParallel, DeepSpeed": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: re.sub(r"layers\.(\d)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module.", name),
    "activation checkpointing": lambda name: name.replace("self_attn.", "self_attn._checkpoint_wrapped_module."),
    "an adapter's name": lambda name: name.replace(".weight", ".sft.weight"),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_what_a_wrapper_has_put_into_all_names_is_taken_out(
    build: Any, base: Path, adapter: Path, copied: Path, rename: Callable[[str], str], beside: bool
) -> None:
    expected = logits(*fresh(base, adapter))
    others = [build(base, adapter)] if beside else []
    edit_weights(copied, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    with pytest.warns(SwayWarning, match=r"have '.*' in their names.* PEFT alone does not read them"):
        backend = build(base, copied)
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(expected)
        assert logits(tuned.model, tuned.tokenizer).equal(expected)
    assert [each.changes() for each in (backend, *others)] == [[]] * (1 + len(others))


@pytest.mark.parametrize("config", [("IA3Config", {}), ("LoHaConfig", {"r": 2})], ids=["IA3", "LoHa"])
def test_what_a_wrapper_has_put_into_the_names_of_another_type_is_taken_out(
    build: Any, base: Path, tmp_path: Path, config: tuple[str, dict[str, Any]]
) -> None:
    import peft

    fields = {"task_type": "CAUSAL_LM", "target_modules": ["k_proj"], **config[1]}
    fields |= {"feedforward_modules": []} if config[0] == "IA3Config" else {}
    adapter = save_adapter(tmp_path, base, getattr(peft, config[0])(**fields))
    expected = logits(*fresh(base, adapter))
    edit_weights(adapter, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    with pytest.warns(SwayWarning, match=r"have '_orig_mod' in their names"):
        backend = build(base, adapter)
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(expected)


def test_what_a_wrapper_has_put_into_all_names_of_a_pickle_is_taken_out(
    build: Any, base: Path, adapter: Path, copied: Path
) -> None:
    edit_weights(copied, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    with pytest.warns(SwayWarning, match=r"have '_orig_mod' in their names.* PEFT alone does not read them"):
        backend = build(base, pickled(copied), allow_pickle=True)
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))


def test_a_pickle_with_a_part_in_all_names_may_hold_tensors_that_are_not_contiguous(
    build: Any, base: Path, adapter: Path, copied: Path
) -> None:
    import torch

    edit_weights(copied, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    path = pickled(copied) / "adapter_model.bin"
    torch.save({name: tensor.t().contiguous().t() for name, tensor in torch.load(path).items()}, path)
    with pytest.warns(SwayWarning, match=r"have '_orig_mod' in their names"):
        backend = build(base, copied, allow_pickle=True)
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))


def test_several_pickles_of_one_configuration_may_be_on_one_base(build: Any, base: Path, tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2, 3)]
    expected = [logits(*fresh(base, folder)) for folder in folders]
    backends = [build(base, pickled(folder), allow_pickle=True) for folder in folders]
    for backend, logits_of_peft in zip(backends, expected, strict=True):
        with backend.as_finetuned() as tuned:
            assert view_logits(tuned).equal(logits_of_peft)
            assert logits(tuned.model, tuned.tokenizer).equal(logits_of_peft)


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An adapter with the base's head in modules_to_save."""
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return save_adapter(tmp_path_factory.mktemp("with_head"), base, config)


def _state_dict(base: Path, adapter: Path, name: str) -> dict[str, Any]:
    """Return what ``model.state_dict()`` has of an adapter that is loaded by a name."""
    from peft import PeftModel

    model, _ = fresh(base)
    with quiet():
        named = PeftModel.from_pretrained(model, str(adapter), name)
    return {key: tensor.clone() for key, tensor in named.state_dict().items()}


def test_a_saved_module_may_have_the_adapters_name_in_its_keys(
    build: Any, base: Path, with_head: Path, tmp_path: Path
) -> None:
    own = {key: tensor for key, tensor in _state_dict(base, with_head, "sft").items() if ".sft" in key}
    assert any(".modules_to_save.sft." in key for key in own)
    folder = edit_weights(shutil.copytree(with_head, tmp_path / "copied"), lambda _: own)
    with pytest.warns(SwayWarning, match=r"have 'sft' in their names.* PEFT alone does not read them"):
        backend = build(base, folder)
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, with_head)))


@pytest.mark.parametrize("name", ["sft", "default"])
@pytest.mark.parametrize("as_pickle", [False, True])
def test_a_saved_module_among_all_of_a_state_dict_is_told_with_a_command_that_mends_the_file(
    build: Any, base: Path, with_head: Path, tmp_path: Path, name: str, as_pickle: bool
) -> None:
    whole = _state_dict(base, with_head, name)
    folder = edit_weights(shutil.copytree(with_head, tmp_path / "copied"), lambda _: whole)
    if as_pickle:
        pickled(folder)
    what = (
        rf"contain the adapter's name '{name}' \(.*lm_head\.modules_to_save\.{name}\.weight\), as those of model\.state"
    )
    with pytest.raises(AdapterMismatchError, match=what) as caught:
        build(base, folder, allow_pickle=True)
    run_command_in(caught.value)
    with build(base, folder).as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, with_head)))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_keys_with_the_name_of_another_adapter_are_not_taken_for_another_base(
    build: Any, base: Path, adapter: Path, copied: Path, beside: bool
) -> None:
    """``model.state_dict()`` has such keys, ``save_pretrained`` has not."""
    others = [build(base, adapter)] if beside else []
    edit_weights(copied, lambda ts: {re.sub(r"(q_proj.*)\.weight", r"\1.sft.weight", n): t for n, t in ts.items()})
    remedy = r"save_pretrained\(folder, selected_adapters=\['sft'\]\)"
    with pytest.raises(AdapterMismatchError, match=rf"contain the adapter's name 'sft'.*{remedy}") as caught:
        build(base, copied)
    assert "Name the base" not in str(caught.value)
    assert [each.changes() for each in others] == [[]] * len(others)
    run_command_in(caught.value)
    with build(base, copied).as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))


OTHER_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "IA3": ({"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, "ia3_l"),
    "Vera": ({"target_modules": ["q_proj"], "r": 4}, "vera_lambda_[bd]"),
    "LoHa": ({"target_modules": ["q_proj"], "r": 2}, r"hada_\w+"),
}


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_an_adapters_name_in_the_keys_of_another_type_is_refused_with_a_command_that_mends_the_file(
    build: Any, base: Path, tmp_path: Path, kind: str
) -> None:
    import peft

    fields, tensor = OTHER_TYPES[kind]
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **fields)
    folder = save_adapter(tmp_path / "adapter", base, config)
    expected = logits(*fresh(base, folder))
    edit_weights(folder, lambda ts: {re.sub(rf"({tensor})$", r"\1.sft", name): t for name, t in ts.items()})
    what = rf"has tensors whose names contain the adapter's name 'sft' \(.*{tensor}\.sft"
    with pytest.raises(AdapterMismatchError, match=what) as caught:
        build(base, folder)
    run_command_in(caught.value)
    with build(base, folder).as_finetuned() as tuned:
        assert view_logits(tuned).equal(expected)


@pytest.mark.usefixtures("no_search")
def test_a_saved_modules_name_is_mended_where_it_alone_has_the_adapters(
    build: Any, base: Path, with_head: Path, tmp_path: Path
) -> None:
    """PEFT writes ``lm_head.weight``, and ``model.state_dict()`` has ``lm_head.modules_to_save.sft.weight``."""
    folder = shutil.copytree(with_head, tmp_path / "copied")
    edit_weights(
        folder, lambda ts: {n.replace("lm_head.weight", "lm_head.modules_to_save.sft.weight"): t for n, t in ts.items()}
    )
    with pytest.raises(AdapterMismatchError, match="the adapter's name 'sft'") as caught:
        build(base, folder)
    run_command_in(caught.value)
    with build(base, folder).as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, with_head)))


@pytest.mark.parametrize("task", ["null", "missing"])
def test_a_config_without_a_task_is_of_a_causal_language_model(
    build: Any, base: Path, adapter: Path, copied: Path, task: str
) -> None:
    path = copied / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config.pop("task_type") == "CAUSAL_LM"
    path.write_text(json.dumps(config if task == "missing" else config | {"task_type": None}))
    backend = build(base, copied)
    assert backend.spec.task in (None, "causal")
    with backend.as_finetuned() as tuned, backend.as_base() as plain:
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))
        assert view_logits(plain).equal(logits(*fresh(base)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_may_begin_with_a_byte_order_mark(
    build: Any, base: Path, adapter: Path, copied: Path, encoding: str
) -> None:
    path = copied / "adapter_config.json"
    path.write_text(path.read_text(), encoding)
    with build(base, copied).as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))


# --- adapters whose configuration names tensors -----------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_adalora_may_have_left_a_layer_without_a_rank(
    build: Any, base: Path, adapter: Path, tmp_path: Path, beside: bool
) -> None:
    import peft

    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    pruned = prune(save_adapter(tmp_path / "pruned", base, config))
    expected = logits(*fresh(base, pruned))
    assert not expected.equal(logits(*fresh(base)))
    others = [build(base, adapter)] if beside else []
    backend = build(base, pruned)
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(expected)
    assert [each.changes() for each in (backend, *others)] == [[]] * (1 + len(others))


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_the_output_layer_of_gpt_neox_is_found_by_its_name_in_either_version_of_transformers(
    build: Any, tmp_path: Path, field: str
) -> None:
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    base = tmp_path / "base"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = AutoConfig.for_model("gpt_neox", vocab_size=make_tokenizer(base), bos_token_id=1, eos_token_id=2, **sizes)
    save_tiny(lambda: auto.from_config(config), base)
    head = next(name for name, module in fresh(base)[0].named_modules() if name in ("lm_head", "embed_out"))
    other = {"lm_head": "embed_out", "embed_out": "lm_head"}[head]
    targets = ["query_key_value"]
    named: dict[str, Any] = {field: [*targets, head] if field == "target_modules" else [head]}
    fields: dict[str, Any] = {"target_modules": targets} | named
    adapter = save_adapter(tmp_path / "adapter", base, LoraConfig(task_type="CAUSAL_LM", **fields))
    expected = logits(*fresh(base, adapter))
    edit_weights(adapter, lambda tensors: {name.replace(head, other): tensor for name, tensor in tensors.items()})
    edit_config(adapter, **{name: [each.replace(head, other) for each in value] for name, value in named.items()})
    with build(base, adapter).as_finetuned() as tuned:
        assert view_logits(tuned).equal(expected)
