"""`view.model` belongs to the test, and has this view's adapter or none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.sharing.tensor_memory import address_of
from tests.tiny import TEXT, make_adapter, make_base, quiet
from tests.unit.backends.hf.insides import base_in, computing_model, handed_to
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path


def test_the_models_of_both_sides_are_two_and_each_computes_its_own(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        models = plain.model, tuned.model
        assert models[0] is not models[1]
        found = [logits(model, plain.tokenizer) for model in models]
    assert found[0].equal(logits(*fresh(base)))
    assert found[1].equal(logits(*fresh(base, adapter)))
    assert not found[0].equal(found[1])


def test_a_model_is_of_the_class_that_its_libraries_make(build: Any, base: Path, adapter: Path) -> None:
    from peft import PeftModel, PeftModelForCausalLM
    from transformers import LlamaForCausalLM

    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert type(plain.model) is LlamaForCausalLM
        assert isinstance(tuned.model, PeftModel)
        assert type(tuned.model) is PeftModelForCausalLM
        assert type(tuned.model.get_base_model()) is LlamaForCausalLM


def test_a_model_without_an_adapter_has_nothing_of_peft(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as tuned, backend.as_base() as plain:
        assert "lora" in repr(tuned.model)
        assert "lora" not in repr(plain.model)
        assert not hasattr(plain.model, "peft_config")
        assert [name for name, _ in plain.model.named_parameters()] == _names(fresh(base)[0])


def _names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_the_parameters_of_a_tuned_model_have_pefts_own_names(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    first, second, third = build(base, adapter), build(base, other_adapter), build(base, adapter)
    for backend, folder in ((first, adapter), (second, other_adapter), (third, adapter)):
        with backend.as_finetuned() as tuned:
            assert _names(tuned.model) == _names(fresh(base, folder)[0])
            assert any(".lora_A.default." in name for name in _names(tuned.model))
            assert list(tuned.model.peft_config) == ["default"]
            assert tuned.model.active_adapter == "default"


def test_with_its_adapter_disabled_a_tuned_model_computes_the_base(build: Any, base: Path, adapter: Path) -> None:
    expected = logits(*fresh(base))
    with build(base, adapter).as_finetuned() as tuned:
        with tuned.model.disable_adapter():
            assert view_logits(tuned).equal(expected)
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
def test_a_model_is_the_same_while_its_view_is_open_and_another_one_in_the_next(
    build: Any, base: Path, adapter: Path, side: str
) -> None:
    opened = getattr(build(base, adapter), side)
    with opened() as view, opened() as beside:
        model = view.model
        view.logprob_of("the sun", " rises")
        assert view.model is model
        assert beside.model is not model
    with opened() as view:
        assert view.model is not model


def test_threads_that_ask_a_view_for_its_model_get_one(build: Any, base: Path) -> None:
    with build(base).as_base() as view, ThreadPoolExecutor(8) as pool:
        models = list(pool.map(lambda _: view.model, range(64)))
    assert len({id(model) for model in models}) == 1


def test_a_view_that_only_scores_makes_no_model(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned, backend.as_scaled_adapter(0.5) as scaled:
        for view in (plain, tuned, scaled):
            view.logprobs_of([("the sun", " rises"), ("the moon", " sets")])
            view.rolling_logprob(TEXT)
            view.next_token_dist(TEXT)
            view.generate_many([TEXT, "the sun"], max_new_tokens=2)
            handed = handed_to(view)
            assert handed.model is None
            assert handed.tokenizer is None
            assert view.model is handed.model


def _things(model: Any) -> set[int]:
    return {id(thing) for thing in (*model.modules(), *model.parameters(), *model.buffers(), model.config)}


def test_no_two_models_have_an_object_in_common(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as a, backend.as_finetuned() as b, backend.as_finetuned() as c:
        found = [_things(view.model) for view in (a, b, c)] + [_things(computing_model(view)) for view in (a, b)]
        found.append(_things(base_in(backend).pristine.model))
        assert len(set.union(*found)) == sum(map(len, found))


def test_models_of_several_views_share_the_memory_of_a_converted_base(
    build: Any, adapter: Path, tmp_path: Path
) -> None:
    backend = build(make_base(tmp_path, dtype="bfloat16"), adapter)
    with backend.as_base() as a, backend.as_base() as b, backend.as_finetuned() as c:
        models = a.model, b.model, c.model.get_base_model()
        assert len({address_of(model.model.layers[0].mlp.up_proj.weight) for model in models}) == 1
        _ = a.model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
        assert len({address_of(model.model.layers[0].mlp.up_proj.weight) for model in models}) == 2


@pytest.mark.parametrize("lam", [0.0, 0.25, 2.0])
def test_a_scaled_model_keeps_its_factor_for_as_long_as_its_view_is_open(
    build: Any, base: Path, adapter: Path, lam: float
) -> None:
    from peft.tuners.lora import LoraLayer

    model, tokenizer = fresh(base, adapter)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= lam
    backend = build(base, adapter)
    with backend.as_scaled_adapter(lam) as scaled, backend.as_finetuned() as tuned:
        tuned.logprob_of("the sun", " rises")
        scaled.logprob_of("the sun", " rises")
        assert view_logits(scaled).equal(logits(model, tokenizer))


def test_gradients_flow_through_a_tests_own_model(build: Any, base: Path, adapter: Path) -> None:
    reference, tokenizer = fresh(base, adapter)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    backend = build(base, adapter)
    with backend.as_finetuned() as tuned:
        model = tuned.model
        for each in (model, reference):
            each.requires_grad_(True)
            each(ids, labels=ids).loss.backward()
        expected = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.equal(expected[name].grad), name
    assert backend.changes() == []


def test_saving_a_tuned_model_writes_exactly_its_own_adapter(
    build: Any, base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    backends = build(base, other_adapter), build(base, adapter)
    with backends[0].as_finetuned() as other, backends[1].as_finetuned() as tuned, quiet():
        other.logprob_of("the sun", " rises")
        tuned.model.save_pretrained(tmp_path / "saved")
    saved = {path.name for path in (tmp_path / "saved").rglob("*") if path.is_file()} - {"README.md"}
    assert saved == {"adapter_config.json", "adapter_model.safetensors"}
    assert logits(*fresh(base, tmp_path / "saved")).equal(logits(*fresh(base, adapter)))


def test_saving_a_base_writes_the_base(build: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned(), quiet():
        plain.model.save_pretrained(tmp_path)
        plain.tokenizer.save_pretrained(tmp_path)
    assert logits(*fresh(tmp_path)).equal(logits(*fresh(base)))


def test_merging_a_tuned_model_gives_what_peft_merges(build: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    reference, tokenizer = fresh(base, adapter)
    backend = build(base, adapter)
    with backend.as_finetuned() as tuned, backend.as_finetuned() as after:
        merged = tuned.model.merge_and_unload()
        assert logits(merged, tokenizer).equal(logits(reference.merge_and_unload(), tokenizer))
        assert view_logits(after).equal(logits(*fresh(base, adapter)))


def test_raw_models_and_scores_are_right_in_threads_at_once(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    backend = build(base, adapter)
    third = build(base, make_adapter(tmp_path, base, seed=7))
    opened = [backend.as_base, backend.as_finetuned, third.as_finetuned]
    expected = []
    for each in opened:
        with each() as view:
            expected.append((view_logits(view), view.rolling_logprob(TEXT).total_logprob))

    def work(number: int) -> list[bool]:
        right = []
        for turn in range(6):
            which = (number + turn) % 3
            with opened[which]() as view:
                right.append(view.rolling_logprob(TEXT).total_logprob == expected[which][1])
                right.append(view_logits(view).equal(expected[which][0]))
        return right

    with ThreadPoolExecutor(4) as pool:
        assert [all(right) for right in pool.map(work, range(4))] == [True] * 4
