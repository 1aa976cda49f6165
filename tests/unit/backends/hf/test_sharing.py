from __future__ import annotations

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from tests.tiny import edit_config, make_adapter, make_base
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.insides import WAIT, computing_model, held_up
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path


def test_adapters_of_one_base_load_it_once(
    build: Any, base: Path, adapter: Path, other_adapter: Path, loads: list[str]
) -> None:
    for folder in (adapter, other_adapter, None):
        build(base, folder)
    assert loads == [str(base)]


def test_no_collection_is_full_while_a_model_loads(base: Path, adapter: Path) -> None:
    thresholds: list[int] = []
    before = gc.get_threshold()
    HFBuilder(on_base_load=lambda *_: thresholds.append(gc.get_threshold()[2]))(spec_of(base, adapter)).close()
    assert min(thresholds) > 10**6
    assert gc.get_threshold() == before


def test_the_base_goes_with_its_last_user(build: Any, base: Path, adapter: Path, loads: list[str]) -> None:
    first, second = build(base, adapter), build(base)
    first.close()
    build(base, adapter)
    assert len(loads) == 1
    second.close()
    with build(base, adapter).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, adapter)))
    assert len(loads) == 1


def test_the_base_is_loaded_again_after_all_are_closed(build: Any, base: Path, adapter: Path, loads: list[str]) -> None:
    build(base, adapter).close()
    build(base, adapter)
    assert len(loads) == 2


def test_a_held_base_survives_a_swap_of_its_only_adapter(
    build: Any, builder: HFBuilder, base: Path, adapter: Path, other_adapter: Path, loads: list[str]
) -> None:
    backend = build(base, adapter)
    for folder in (other_adapter, adapter, other_adapter):
        with builder.pin(builder.check(spec_of(base, folder))):
            backend.close()
            backend = build(base, folder)
        with backend.as_base() as plain, backend.as_finetuned() as tuned:
            assert view_logits(plain).equal(logits(*fresh(base)))
            assert view_logits(tuned).equal(logits(*fresh(base, folder)))
    assert len(loads) == 1


def test_dtype_and_folder_make_another_base(build: Any, base: Path, loads: list[str]) -> None:
    build(base)
    build(base, dtype="bf16")
    assert len(loads) == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_every_adapter_on_a_shared_base_is_bit_equal_to_peft(
    build: Any, base: Path, tmp_path: Path, dtype: str, saved: str
) -> None:
    import torch

    from tests.tiny import edit_weights

    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    variants: list[dict[str, Any]] = [
        {"targets": ("q_proj", "v_proj")},
        {"targets": ("q_proj", "v_proj"), "seed": 3},
        {"targets": ("q_proj", "v_proj"), "r": 8},
        {"targets": "all-linear"},
        {"targets": ("gate_proj",), "use_rslora": True},
        {"targets": ("q_proj", "up_proj"), "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"targets": ("q_proj",), "use_dora": True},
        {"targets": ("q_proj", "embed_tokens")},
        {"targets": ("o_proj",), "lora_dropout": 0.5},
        {"targets": ("o_proj",), "layers_to_transform": [1]},
        {"targets": ("q_proj", "v_proj"), "seed": 4},
    ]
    for i, variant in enumerate(variants):
        folder = make_adapter(tmp_path / str(i), base, **variant)
        edit_weights(folder, lambda tensors: {k: t.to(getattr(torch, saved)) for k, t in tensors.items()})
        with build(base, folder, dtype=dtype).as_finetuned() as view:
            assert view_logits(view).equal(logits(*fresh(base, folder, dtype=name))), variant
            assert not any(module.training for module in view.model.modules())
            assert not any(parameter.requires_grad for parameter in view.model.parameters())
    with build(base, dtype=dtype).as_base() as view:
        assert view_logits(view).equal(logits(*fresh(base, dtype=name)))


def test_two_threads_that_build_on_one_base_load_it_once(
    build: Any, base: Path, adapter: Path, other_adapter: Path, loads: list[str]
) -> None:
    together = threading.Barrier(4)

    def work(folder: Path) -> Any:
        together.wait()
        backend = build(base, folder)
        with backend.as_finetuned() as view:
            return view.logprob_of("the sun", " rises in the east")

    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(work, [adapter, other_adapter] * 2))
    assert len(loads) == 1
    assert scores[:2] == scores[2:]
    assert scores[0] != scores[1]


def test_an_adapter_can_be_put_on_during_a_forward_pass_of_its_base(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    with build(base, adapter).as_finetuned() as view, ThreadPoolExecutor(1) as pool:
        expected = view.logprob_of("the sun", " rises")
        with held_up(view) as begun:
            score = pool.submit(view.logprob_of, "the sun", " rises")
            assert begun.wait(WAIT)
            with build(base, other_adapter).as_finetuned() as other:
                assert view_logits(other).equal(logits(*fresh(base, other_adapter)))
            assert not score.done()
        assert score.result(WAIT) == expected


def test_a_changed_base_is_not_served_again(
    build: Any, base: Path, adapter: Path, other_adapter: Path, loads: list[str]
) -> None:
    first = build(base, adapter)
    with first.as_base() as view:
        view.tokenizer.add_tokens(["quark"])
    second = build(base, other_adapter)
    assert len(loads) == 2
    assert second.changes() == []
    assert first.changes() != []


def test_an_adapter_for_other_layers_is_not_active_elsewhere(build: Any, tmp_path: Path, base: Path) -> None:
    first = build(base, make_adapter(tmp_path / "a", base, targets=("q_proj",)))
    build(base, make_adapter(tmp_path / "b", base, targets=("down_proj",)))
    with first.as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, tmp_path / "a")))


def test_another_base_is_another_base(build: Any, base: Path, tmp_path: Path, loads: list[str]) -> None:
    build(base)
    build(make_base(tmp_path, seed=1))
    assert loads == [str(base), str(tmp_path)]


def test_a_load_in_inference_mode_gives_the_same_as_any_other(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    import torch

    with torch.inference_mode():
        first = build(base, adapter)
    second = build(base, other_adapter)
    assert first.changes() == second.changes() == []
    with first.as_finetuned() as view:
        assert not any(parameter.is_inference() for parameter in view.model.parameters())


def test_an_adapter_that_peft_itself_puts_on_follows_one_that_left(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    plain, first = build(base), build(base, adapter)
    first.close()
    folder = make_adapter(tmp_path, base, use_dora=True)
    with build(base, folder).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, folder)))
    assert plain.changes() == []


@pytest.fixture
def alike(base: Path, tmp_path: Path) -> list[Path]:
    """Two adapters that differ only in their weights."""
    return [make_adapter(tmp_path / name, base, seed=seed) for seed, name in enumerate(("first", "second"), 5)]


def test_adapters_of_one_configuration_take_turns_with_one_tree(build: Any, base: Path, alike: list[Path]) -> None:
    expected = [logits(*fresh(base, folder)) for folder in alike]
    backends = [build(base, folder) for folder in alike]
    with backends[0].as_finetuned() as one, backends[1].as_finetuned() as other:
        models = set()
        for _ in range(2):
            for view, right in zip((one, other), expected, strict=True):
                view.logprob_of("the sun", " rises")
                model = computing_model(view)
                assert logits(model, view.tokenizer).equal(right)
                models.add(id(model))
        assert len(models) == 1


LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")


@pytest.mark.parametrize(
    ("targets", "weighted"),
    [
        ("all-linear", "all-linear"),
        (None, ("q_proj", "v_proj")),
        ([f"model.layers.{n}.{layer}" for n in range(4) for layer in LAYERS], tuple(LAYERS)),
    ],
    ids=["all-linear", "the type's own", "one by one"],
)
def test_adapters_whose_configuration_peft_rewrites_take_turns_with_one_tree(
    build: Any, tmp_path: Path, targets: Any, weighted: Any
) -> None:
    base = make_base(tmp_path / "base", layers=4)
    folders = [
        edit_config(make_adapter(tmp_path / str(seed), base, seed=seed, targets=weighted), target_modules=targets)
        for seed in (5, 6)
    ]
    models = set()
    for folder in folders:
        expected, tokenizer = fresh(base, folder)
        with build(base, folder).as_finetuned() as view:
            view.logprob_of("the sun", " rises")
            models.add(id(computing_model(view)))
            assert view_logits(view).equal(logits(expected, tokenizer))
            assert view.model.peft_config["default"].to_dict() == expected.peft_config["default"].to_dict()
    assert len(models) == 1


def test_adapters_of_one_configuration_that_are_asked_at_once_have_a_tree_each(
    build: Any, base: Path, alike: list[Path]
) -> None:
    backends = [build(base, folder) for folder in alike]
    with (
        backends[0].as_finetuned() as one,
        backends[1].as_finetuned() as other,
        ThreadPoolExecutor(1) as pool,
    ):
        alone = [view.logprob_of("the sun", " rises") for view in (one, other)]
        with held_up(one) as begun:
            waiting = pool.submit(one.logprob_of, "the sun", " rises")
            assert begun.wait(WAIT)
            assert other.logprob_of("the sun", " rises") == alone[1]
        assert waiting.result(WAIT) == alone[0] != alone[1]


def test_a_closed_adapter_leaves_its_weights_in_no_tree(build: Any, base: Path, alike: list[Path]) -> None:
    kept, closed = (build(base, folder) for folder in alike)
    for backend in (kept, closed):
        with backend.as_finetuned() as view:
            view.logprob_of("the sun", " rises")
    closed.close()
    assert closed.leak() is None
    with kept.as_finetuned() as view:
        view.logprob_of("the sun", " rises")
        assert logits(computing_model(view), view.tokenizer).equal(logits(*fresh(base, alike[0])))


def test_the_order_of_patterns_makes_another_configuration(build: Any, base: Path, tmp_path: Path) -> None:
    orders = (("q_proj", "layers.0.self_attn.q_proj"), ("layers.0.self_attn.q_proj", "q_proj"))
    folders = []
    for i, order in enumerate(orders):
        folder = make_adapter(
            tmp_path / str(i), base, seed=i, alpha_pattern={"q_proj": 2, order[order[0] == "q_proj"]: 64}
        )
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        config["alpha_pattern"] = {name: config["alpha_pattern"][name] for name in order}  # PEFT sorts them
        path.write_text(json.dumps(config))
        folders.append(folder)
    backends = [build(base, folder) for folder in folders]
    for backend, folder in zip(backends, folders, strict=True):
        with backend.as_finetuned() as view:
            assert view_logits(view).equal(logits(*fresh(base, folder)))


def _halving(forward: Any) -> Any:
    def halve_and_go_on(self: Any, hidden: Any) -> Any:
        self.down_proj.weight.data.mul_(0.5)
        return forward(self, hidden)

    return halve_and_go_on


@pytest.mark.parametrize("undone", [True, False])
def test_writes_of_a_patched_class_reach_no_other_backend(
    build: Any, base: Path, alike: list[Path], monkeypatch: pytest.MonkeyPatch, undone: bool
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    backends = [build(base, folder, allow_pickle=undone) for folder in alike]

    def scores() -> list[float]:
        found = []
        for backend in backends:
            with backend.as_finetuned() as tuned, backend.as_base() as plain:
                found += [tuned.logprob_of("the sun", " rises"), plain.logprob_of("the sun", " rises")]
        return found

    before = scores()
    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", _halving(LlamaMLP.forward))
        with backends[0].as_finetuned() as view:
            assert view.logprob_of("the sun", " rises") != before[0]
        if not undone:
            assert any("LlamaMLP" in line for line in backends[0].changes())
    assert scores() == before


def test_a_patched_class_of_pefts_is_a_change(
    build: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    backend = build(base, adapter)
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, hidden: forward(self, hidden) * 2)
    assert any("lora.layer.Linear" in line for line in backend.changes())
    assert Linear.forward is forward
