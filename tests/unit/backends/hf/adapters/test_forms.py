"""Different forms of the same adapter: names in the keys of its weights, encodings of its config."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import AdapterMismatchError, SwayWarning
from tests.tiny import edit_weights
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_may_begin_with_a_byte_order_mark(
    build: Any, base: Path, adapter: Path, copied: Path, encoding: str
) -> None:
    path = copied / "adapter_config.json"
    path.write_text(path.read_text(), encoding)
    with build(base, copied).as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))
