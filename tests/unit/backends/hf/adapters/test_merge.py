"""An adapter on other adapters, or on a fine-tuned model: PEFT's numbers, the base's memory, and what is refused.

`test_zoo.py` merges each kind of adapter.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.checkpoints.sizes import model_sizes
from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.hygiene.memory import WeightsWatch
from pytest_sway.backends.hf.model.base import MergedBase
from pytest_sway.backends.hf.model.pristine import Pristine
from pytest_sway.cache.backend_cache import BackendCache
from pytest_sway.errors import AdapterMismatchError, SpecError, SwayWarning
from tests.tiny import edit_config, make_adapter, make_base, make_tokenizer, pickled, poison, quiet, save_adapter
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.insides import base_in, bases_in, tokenizer_in
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS, HIDDEN, KEY_VALUES = 2, 32, 16
OF_QV = LAYERS * (HIDDEN * HIDDEN + HIDDEN * KEY_VALUES) * 4
"""The bytes of the weights that the adapters of `tests.tiny` change, in float32."""


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("third"), base, seed=3, targets=("down_proj",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model that was fine-tuned from the base."""
    return make_base(tmp_path_factory.mktemp("saved"), seed=1)


def by_hand(base: Path, *adapters: Path, dtype: str = "float32") -> Any:
    """Return the logits of plain PEFT: all adapters but the last merged, and the last put on."""
    from peft import PeftModel

    model, tokenizer = fresh(base, dtype=dtype)
    with quiet():
        for folder in adapters[:-1]:
            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        model = PeftModel.from_pretrained(model, str(adapters[-1])).eval()
    return logits(model, tokenizer)


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_fine_tuned_view_is_all_of_them_and_the_base_view_the_base(
    build: Any, base: Path, adapter: Path, other_adapter: Path, third: Path, dtype: str
) -> None:
    backend = build(base, [adapter, third, other_adapter], dtype=dtype)
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        for _ in range(2):
            assert view_logits(plain).equal(logits(*fresh(base, dtype=name)))
            assert view_logits(tuned).equal(by_hand(base, adapter, third, other_adapter, dtype=name))
        assert plain.logprob_of("the sun", " rises") != tuned.logprob_of("the sun", " rises")
    assert backend.changes() == []


def test_their_order_counts(build: Any, base: Path, tmp_path: Path, adapter: Path) -> None:
    dora = make_adapter(tmp_path, base, seed=5, use_dora=True)  # its norms depend on what it is put on
    for order in ([adapter, dora], [dora, adapter]):
        with build(base, order).as_finetuned() as tuned:
            assert view_logits(tuned).equal(by_hand(base, *order))


def test_one_adapter_twice_counts_twice(build: Any, base: Path, adapter: Path) -> None:
    with build(base, [adapter, adapter]).as_finetuned() as tuned:
        assert view_logits(tuned).equal(by_hand(base, adapter, adapter))
        assert not view_logits(tuned).equal(logits(*fresh(base, adapter)))


def test_an_adapter_is_put_on_a_fine_tuned_model(
    build: Any, base: Path, saved: Path, tmp_path: Path, loads: list[str]
) -> None:
    folder = make_adapter(tmp_path, saved)
    backend = build(base, folder, finetuned=saved)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(tuned).equal(logits(*fresh(saved, folder)))
    assert loads == [str(base), str(saved)]
    with build(base, finetuned=saved).as_finetuned() as without:
        assert view_logits(without).equal(logits(*fresh(saved)))
    assert len(loads) == 2


def test_an_adapter_is_put_on_its_base_loaded_in_another_way(build: Any, base: Path, adapter: Path) -> None:
    eager = {"attn_implementation": "eager"}
    backend = build(base, adapter, finetuned=base, finetuned_model_kwargs=eager)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert (plain.model.config._attn_implementation, tuned.model.config._attn_implementation) == ("sdpa", "eager")
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(tuned).equal(logits(*fresh(base, adapter, **eager)))


def test_several_adapters_are_put_on_a_fine_tuned_model(build: Any, base: Path, saved: Path, tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / str(seed), saved, seed=seed) for seed in (1, 2)]
    backend = build(base, folders, finetuned=saved)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(tuned).equal(by_hand(saved, *folders))


def test_tied_embeddings_that_merging_unties_are_pefts(build: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    first = make_adapter(tmp_path / "first", base, targets=("lm_head", "q_proj"))
    second = make_adapter(tmp_path / "second", base, seed=2)
    backend = build(base, [first, second])
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(tuned).equal(by_hand(base, first, second))


def test_scaling_and_noise_are_of_the_last_adapter(build: Any, base: Path, adapter: Path, other_adapter: Path) -> None:
    backend = build(base, [adapter, other_adapter])
    merged, _ = fresh(base, adapter)
    expected = logits(merged.merge_and_unload(), fresh(base)[1])
    with backend.as_scaled_adapter(0.0) as none, backend.as_null_adapter(1, init_scale=0.0) as silent:
        assert view_logits(none).equal(expected)
        assert view_logits(silent).equal(expected)


def test_pickled_adapters_are_merged_if_the_spec_allows_them(
    build: Any, base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    copy = pickled(shutil.copytree(adapter, tmp_path / "copy"))
    with build(base, [copy, other_adapter], allow_pickle=True).as_finetuned() as tuned:
        assert view_logits(tuned).equal(by_hand(base, adapter, other_adapter))


def test_a_pickled_adapter_in_a_list_is_checked_against_its_base(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    wide = pickled(make_adapter(tmp_path / "wide", make_base(tmp_path / "other", hidden=64)))
    edit_config(wide, base_model_name_or_path=None)
    with pytest.raises(AdapterMismatchError, match=f"^the adapter '{wide}' does not fit the base '{base}': "):
        build(base, [wide, adapter], allow_pickle=True)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_merged_base_has_only_what_the_adapters_change(build: Any, base: Path, adapter: Path, third: Path) -> None:
    merged = base_in(build(base, [adapter, adapter, third]), 1)
    assert merged.nbytes == OF_QV
    own = {id(tensor) for tensor in merged.pristine.own}
    changed = {name for name, tensor in merged.pristine.model.named_parameters() if id(tensor) in own}
    assert changed == {
        f"model.layers.{layer}.self_attn.{part}.weight" for layer in range(LAYERS) for part in ("q_proj", "v_proj")
    }


def test_what_is_merged_on_the_way_is_freed(
    build: Any, base: Path, adapter: Path, other_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, on_the_way = MergedBase.close, list[WeightsWatch]()

    def closing(merged: MergedBase) -> None:
        on_the_way.append(WeightsWatch(merged.pristine.own))
        close(merged)

    monkeypatch.setattr(MergedBase, "close", closing)
    build(base, [adapter, other_adapter, adapter])
    assert [watch.alive_bytes() for watch in on_the_way] == [0]


def test_where_no_memory_can_be_shared_each_model_is_merged_anew(
    build: Any, base: Path, adapter: Path, other_adapter: Path, third: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pristine, "_works", lambda self, trial: False)
    backend = build(base, [adapter, third, other_adapter])
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(tuned).equal(by_hand(base, adapter, third, other_adapter))
    backend.close()
    assert backend.leak() is None


@pytest.mark.usefixtures("exposed")
def test_where_memory_is_not_copied_on_write_the_base_is_not_written_to(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    backend = build(base, [adapter, other_adapter])
    assert base_in(backend, 1).nbytes == OF_QV
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(tuned).equal(by_hand(base, adapter, other_adapter))
    assert backend.changes() == []


def test_sizes_are_known_before_the_load(base: Path, adapter: Path, other_adapter: Path) -> None:
    builder = HFBuilder()
    plan = builder.check(spec_of(base, [adapter, other_adapter]))
    backend = builder.build(plan)
    assert plan.sizes is not None
    assert backend.sizes().keys() == plan.sizes.keys()
    assert plan.sizes[plan.models[1].key] == backend.sizes()[plan.models[1].key] == OF_QV
    backend.close()


def test_what_is_quantized_on_load_is_merged_in_its_size(base: Path, adapter: Path, other_adapter: Path) -> None:
    plan = HFBuilder().check(spec_of(base, [adapter, other_adapter]))
    nf4 = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    models = [replace(model, spec=replace(model.spec, model_kwargs=nf4)) for model in plan.models]
    sizes = model_sizes(replace(plan, models=tuple(models)))
    packed = [numel // 2 + numel // 64 * 4 + 16 * 4 for numel in (HIDDEN * HIDDEN, HIDDEN * KEY_VALUES)]
    assert sizes is not None
    assert sizes[plan.models[1].key] == LAYERS * sum(packed)


def test_last_adapters_share_what_they_are_put_on(
    build: Any, builder: HFBuilder, base: Path, adapter: Path, other_adapter: Path, third: Path, loads: list[str]
) -> None:
    backends = [build(base, [adapter, last]) for last in (other_adapter, third)]
    assert base_in(backends[0], 1) is base_in(backends[1], 1)
    assert loads == [str(base)]
    assert len(bases_in(builder)) == 2
    backends[0].close()
    with backends[1].as_finetuned() as tuned:
        assert view_logits(tuned).equal(by_hand(base, adapter, third))


@pytest.mark.parametrize("ways", ["copied on write", "exposed"])
def test_a_merged_base_is_freed_with_its_last_adapter_beside_a_base_that_stays(
    build: Any, builder: HFBuilder, base: Path, adapter: Path, other_adapter: Path, ways: str, request: Any
) -> None:
    if ways == "exposed":
        request.getfixturevalue("exposed")
    plain, backend = build(base), build(base, [adapter, other_adapter])
    with backend.as_finetuned() as tuned:
        tuned.logprob_of("the sun", " rises")
        assert tuned.model is not None
    merged = base_in(backend, 1)
    backend.close()
    assert backend.leak() is None
    assert merged.closed
    assert len(bases_in(builder)) == 1
    with plain.as_base() as view:
        assert view_logits(view).equal(logits(*fresh(base)))


def test_a_model_that_a_test_keeps_is_a_leak(build: Any, base: Path, adapter: Path, other_adapter: Path) -> None:
    plain, backend = build(base), build(base, [adapter, other_adapter])
    with backend.as_finetuned() as tuned:
        mine = tuned.model
    backend.close()
    leak = backend.leak()
    assert leak is not None
    assert leak.nbytes >= OF_QV
    del mine
    assert backend.leak() is None
    assert plain.changes() == []


def test_an_eviction_frees_base_and_merged_base(base: Path, adapter: Path, other_adapter: Path) -> None:
    cache = BackendCache(max_size=1)
    first = cache.get_or_load(spec_of(base, [adapter, other_adapter])).backend
    shared = base_in(first), base_in(first, 1)
    cache.get_or_load(spec_of(base, [other_adapter, adapter]))
    assert not shared[0].closed  # the next one has the same base
    assert shared[1].closed
    cache.evict_all()
    assert shared[0].closed
    assert first.leak() is None


# --- what a test changes ----------------------------------------------------------------------------------------------


def test_a_test_may_do_anything_to_its_model(build: Any, base: Path, adapter: Path, other_adapter: Path) -> None:
    import torch

    backend = build(base, [adapter, other_adapter])
    with backend.as_finetuned() as tuned, torch.no_grad():
        for parameter in tuned.model.parameters():
            parameter.add_(1)
        tuned.model.merge_and_unload()
    assert backend.changes() == []
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert view_logits(plain).equal(logits(*fresh(base)))
        assert view_logits(tuned).equal(by_hand(base, adapter, other_adapter))


@pytest.mark.usefixtures("exposed")
def test_a_write_to_the_merged_weights_is_found_and_they_are_made_anew(
    build: Any, base: Path, adapter: Path, other_adapter: Path, third: Path, loads: list[str]
) -> None:
    import torch

    backend = build(base, [adapter, other_adapter])
    with backend.as_finetuned() as tuned, torch.no_grad():
        tuned.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.add_(1)
    assert backend.changes() == ["merged model: model.layers.0.self_attn.q_proj.weight: contents changed"]
    with build(base, [adapter, third]).as_finetuned() as tuned:
        assert view_logits(tuned).equal(by_hand(base, adapter, third))
    assert len(loads) == 1


def test_a_base_that_is_loaded_anew_gets_a_merged_base_of_its_own(
    build: Any, base: Path, adapter: Path, other_adapter: Path, third: Path, loads: list[str]
) -> None:
    first = build(base, [adapter, other_adapter])
    with first.as_base() as plain:
        plain.tokenizer.add_tokens(["quark"])
    second = build(base, [adapter, third])
    assert len(loads) == 2
    assert base_in(second, 1) is not base_in(first, 1)
    assert second.changes() == []
    first.close()
    assert first.leak() is None


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sft(base: Path, tmp_path: Path) -> Path:
    """An adapter with a tokenizer of its own."""
    folder = make_adapter(tmp_path / "sft", base)
    make_tokenizer(folder, extra=("zebra",))
    return folder


def test_the_last_adapter_that_brings_a_tokenizer_decides(
    build: Any, base: Path, sft: Path, other_adapter: Path, tmp_path: Path
) -> None:
    dpo = shutil.copytree(other_adapter, tmp_path / "dpo")
    backend = build(base, [sft, dpo])
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert tuned.tokenizer.convert_tokens_to_ids("zebra") == len(plain.tokenizer)
        assert plain.tokenizer.convert_tokens_to_ids("zebra") == plain.tokenizer.unk_token_id
    make_tokenizer(dpo, extra=("quark",))
    with build(base, [sft, dpo]).as_finetuned() as tuned:
        assert tuned.tokenizer.convert_tokens_to_ids("quark") == len(tuned.tokenizer) - 1
        assert tuned.tokenizer.convert_tokens_to_ids("zebra") == tuned.tokenizer.unk_token_id


def test_a_last_adapter_may_bring_the_bases_tokenizer_back(
    build: Any, base: Path, sft: Path, other_adapter: Path, tmp_path: Path
) -> None:
    dpo = shutil.copytree(other_adapter, tmp_path / "dpo")
    make_tokenizer(dpo)
    backend = build(base, [sft, dpo])
    assert tokenizer_in(backend) is not None
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert tuned.tokenizer.get_vocab() == plain.tokenizer.get_vocab()


def test_a_changed_tokenizer_of_a_merged_adapter_is_found(
    build: Any, base: Path, sft: Path, other_adapter: Path
) -> None:
    backend = build(base, [sft, other_adapter])
    with backend.as_finetuned() as tuned:
        tuned.tokenizer.add_tokens(["quark"])
    assert backend.changes() == ["merged model: tokenizer: its added tokens changed"]


# --- checks -----------------------------------------------------------------------------------------------------------


def test_each_adapter_is_checked_before_a_load(
    base: Path, adapter: Path, other_adapter: Path, tmp_path: Path, loads: list[str]
) -> None:
    wide = make_adapter(tmp_path / "wide", make_base(tmp_path / "other", hidden=64))
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name))
    for adapters in ([wide, adapter], [adapter, wide], [adapter, wide, other_adapter]):
        with pytest.raises(AdapterMismatchError, match=f"^the adapter '{wide}' does not fit the base '{base}': "):
            builder(spec_of(base, adapters))
    assert loads == []


def test_an_adapter_that_changes_nothing_is_named(
    build: Any, builder: HFBuilder, base: Path, adapter: Path, tmp_path: Path
) -> None:
    idle = make_adapter(tmp_path, base, zero_b=True)
    for adapters in ([idle, adapter], [adapter, idle]):
        with pytest.raises(AdapterMismatchError, match=f"^the adapter '{idle}' changes nothing on "):
            build(base, adapters)
    assert bases_in(builder) == []


def test_an_adapter_of_another_type_that_changes_nothing_is_named(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    from peft import IA3Config

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    idle = save_adapter(tmp_path, base, config, scale=0.0)
    with pytest.raises(AdapterMismatchError, match=f"^the adapter '{idle}' changes nothing on "):
        build(base, [idle, adapter])


def test_a_diverged_adapter_is_named(build: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = poison(shutil.copytree(adapter, tmp_path / "broken"))
    with pytest.raises(AdapterMismatchError, match=f"^the adapter '{broken}' has "):
        build(base, [broken, adapter])


def test_an_adapter_that_cannot_be_merged_is_named_before_a_load(
    base: Path, adapter: Path, tmp_path: Path, loads: list[str]
) -> None:
    from peft import PromptTuningConfig

    prompt = save_adapter(tmp_path, base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name))
    with pytest.raises(SpecError) as refused:
        builder(spec_of(base, [adapter, prompt, adapter]))
    assert str(refused.value).startswith(
        f"the adapter '{prompt}' is number 2 of the spec's list, and all but the last are merged into the base, but it"
        " cannot be merged: it is of the type PROMPT_TUNING (peft_type in its adapter_config.json), which PEFT does not"
        " merge. Name it last, or alone."
    )
    assert loads == []


def test_prompt_tuning_may_be_the_last(build: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    prompt = save_adapter(tmp_path, base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with build(base, [adapter, prompt]).as_finetuned() as tuned:
        assert view_logits(tuned).equal(by_hand(base, adapter, prompt))


# --- the bases that adapters name -------------------------------------------------------------------------------------


@pytest.fixture
def mismatches(base: Path) -> Callable[..., list[str]]:
    def warned(*adapters: Path, **fields: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            builder = HFBuilder()
            builder.build(builder.check(spec_of(base, list(adapters), **fields))).close()
        return [str(each.message) for each in caught if each.category is SwayWarning]

    return warned


def test_a_later_adapter_may_name_the_merged_model(
    base: Path, adapter: Path, tmp_path: Path, mismatches: Callable[..., list[str]]
) -> None:
    with quiet():
        fresh(base, adapter)[0].merge_and_unload().save_pretrained(tmp_path / "merged")
    dpo = make_adapter(tmp_path / "dpo", tmp_path / "merged", seed=2)
    assert mismatches(adapter, dpo) == []
    assert len(mismatches(dpo, adapter)) == 1  # as the first, it is put on the base


def test_a_later_adapter_of_another_model_is_reported(
    base: Path, adapter: Path, tmp_path: Path, mismatches: Callable[..., list[str]]
) -> None:
    other = make_base(tmp_path / "other", rope_theta=5.0)
    dpo = make_adapter(tmp_path / "dpo", other, seed=2)
    (found,) = mismatches(adapter, dpo)
    assert found.startswith(f"the adapter '{dpo}' was trained on '{other}'")


def test_an_adapter_on_a_fine_tuned_model_is_to_name_that_model(
    saved: Path, adapter: Path, tmp_path: Path, mismatches: Callable[..., list[str]]
) -> None:
    assert mismatches(make_adapter(tmp_path, saved), finetuned=saved) == []
    (found,) = mismatches(adapter, finetuned=saved)
    assert f"but the base is '{saved}'" in found


def test_the_policy_for_other_bases_holds_for_each_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    stranger = edit_config(
        shutil.copytree(adapter, tmp_path / "stranger"),
        base_model_name_or_path=str(make_base(tmp_path / "other", seed=7)),
    )
    with pytest.raises(AdapterMismatchError, match=f"^the adapter '{stranger}' was trained on "):
        HFBuilder(on_base_mismatch="error").check(spec_of(base, [stranger, adapter]))
