from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import BackendClosedError
from tests.tiny import quiet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _weight(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight


def _lora(model: Any) -> Any:
    return next(p for name, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in name)


def _in_place(model: Any, _: Any) -> None:
    import torch

    with torch.no_grad():
        _weight(model).add_(1)


def _one_embedding(model: Any, _: Any) -> None:
    model.get_input_embeddings().weight.data.mul_(1.0001)


def _new_parameter(model: Any, _: Any) -> None:
    import torch

    model.base_model.model.lm_head.weight = torch.nn.Parameter(model.base_model.model.lm_head.weight.detach().clone())


def _merge(model: Any, _: Any) -> None:
    model.merge_adapter()


def _add_adapter(model: Any, _: Any) -> None:
    from peft import LoraConfig

    with quiet():
        model.add_adapter("mine", LoraConfig(target_modules=["o_proj"]))


def _delete_adapter(model: Any, _: Any) -> None:
    with quiet():
        model.delete_adapter(model.active_adapter)


def _resize(model: Any, _: Any) -> None:
    with quiet():
        model.base_model.model.resize_token_embeddings(200)


def _hook(model: Any, _: Any) -> None:
    model.base_model.model.model.layers[1].register_forward_hook(lambda *args: None)


def _scaling(model: Any, _: Any) -> None:
    scaling = model.base_model.model.model.layers[0].self_attn.q_proj.scaling
    for name in scaling:
        scaling[name] *= 2


def _padding(_: Any, tokenizer: Any) -> None:
    tokenizer.padding_side = "left"


CHANGES: list[Any] = [
    pytest.param(_in_place, "parameter model.layers.0.self_attn.q_proj.weight: contents changed", id="in place"),
    pytest.param(
        lambda m, t: _weight(m).data.mul_(2),
        "parameter model.layers.0.self_attn.q_proj.weight: contents changed",
        id="through .data",
    ),
    pytest.param(_one_embedding, "parameter model.embed_tokens.weight: contents changed", id="slightly, through .data"),
    pytest.param(
        lambda m, t: setattr(_weight(m), "data", _weight(m).data.clone()),
        "parameter model.layers.0.self_attn.q_proj.weight: data replaced",
        id="new data",
    ),
    pytest.param(_new_parameter, "parameter lm_head.weight: replaced", id="new parameter"),
    pytest.param(
        lambda m, t: m.base_model.model.model.rotary_emb.inv_freq.mul_(2),
        "buffer model.rotary_emb.inv_freq: contents changed",
        id="buffer",
    ),
    pytest.param(
        lambda m, t: _lora(m).data.mul_(2),
        "adapter parameter model.layers.0.self_attn.q_proj.lora_B.weight: contents changed",
        id="adapter",
    ),
    pytest.param(_scaling, "adapter: scaling changed in 1 layers", id="scaling"),
    pytest.param(
        lambda m, t: m.half(), "parameter model.embed_tokens.weight: dtype torch.float32 -> torch.float16", id="half"
    ),
    pytest.param(lambda m, t: m.train(), "the model: training mode on", id="train"),
    pytest.param(
        lambda m, t: m.base_model.model.model.layers[0].mlp.train(),
        "module model.layers.0.mlp: training mode on",
        id="train a part",
    ),
    pytest.param(
        lambda m, t: m.requires_grad_(True),
        "parameter model.embed_tokens.weight: requires_grad False -> True",
        id="requires_grad",
    ),
    pytest.param(_hook, "module model.layers.1: 1 hooks, 0 before", id="hook"),
    pytest.param(_merge, "module model.layers.0.self_attn.q_proj: adapter merged into its weights", id="merge"),
    pytest.param(lambda m, t: m.unload(), "submodules replaced, added or removed", id="unload"),
    pytest.param(_add_adapter, "adapter 'mine': added", id="add_adapter"),
    pytest.param(_delete_adapter, "adapters: 1 removed", id="delete_adapter"),
    pytest.param(_resize, "parameter model.embed_tokens.weight: ", id="resize"),
    pytest.param(lambda m, t: setattr(m.config, "use_cache", False), "config: use_cache changed", id="config"),
    pytest.param(
        lambda m, t: setattr(m.generation_config, "top_k", 3),
        "generation_config: top_k changed",
        id="generation_config",
    ),
    pytest.param(_padding, "tokenizer: padding_side 'right' -> 'left'", id="padding_side"),
    pytest.param(lambda m, t: t.add_tokens(["quark"]), "tokenizer: length 91 -> 92", id="add_tokens"),
    pytest.param(
        lambda m, t: setattr(t, "chat_template", "{{ x }}"),
        "tokenizer: chat_template None -> '{{ x }}'",
        id="chat_template",
    ),
]


@pytest.mark.parametrize(("change", "line"), CHANGES)
def test_a_change_is_found_and_the_next_user_gets_a_clean_base(
    build: Any, base: Path, adapter: Path, loads: list[str], change: Callable[[Any, Any], object], line: str
) -> None:
    backend = build(base, adapter)
    assert backend.changes() == []
    with backend.as_finetuned() as tuned:
        change(tuned.model, tuned.tokenizer)
    found = backend.changes()
    assert any(line in each for each in found), found
    assert 0 < len(found) <= 11
    backend.close()
    clean = build(base, adapter)
    assert clean.changes() == []
    assert len(loads) == 2


def test_many_changes_are_counted(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as tuned:
        tuned.model.requires_grad_(True)
    assert len(backend.changes()) == 11
    assert backend.changes()[-1].startswith("and ")


def test_everyone_on_a_changed_base_reports_it(build: Any, base: Path, adapter: Path, other_adapter: Path) -> None:
    first, second, third = build(base, adapter), build(base, other_adapter), build(base)
    with first.as_base() as view:
        view.model.base_model.model.model.layers[0].mlp.train()
    expected = ["module model.layers.0.mlp: training mode on"]
    assert [line for line in third.changes() if "mlp:" in line] == expected
    assert [line for line in first.changes() if "mlp:" in line] == expected
    assert second.changes() != []


def test_a_change_stays_found_when_adapters_come_and_go(
    build: Any, base: Path, adapter: Path, other_adapter: Path, builder: Any
) -> None:
    first, second = build(base, adapter), build(base, other_adapter)
    with first.as_base() as view:
        view.model.train()
    second.close()
    assert first.changes() != []


def test_adapters_that_come_and_go_change_nothing(
    build: Any, base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    backend, plain = build(base, adapter), build(base)
    for folder in (other_adapter, shutil.copytree(adapter, tmp_path / "copy")):
        other = build(base, folder)
        assert (backend.changes(), plain.changes(), other.changes()) == ([], [], [])
        other.close()
        assert (backend.changes(), plain.changes()) == ([], [])


def test_an_adapter_that_fails_changes_nothing(build: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    from pytest_sway.errors import AdapterMismatchError
    from tests.tiny import poison

    backend = build(base, adapter)
    with pytest.raises(AdapterMismatchError):
        build(base, poison(shutil.copytree(adapter, tmp_path / "copy")))
    assert backend.changes() == []


def test_using_a_backend_changes_nothing(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with (
        backend.as_base() as plain,
        backend.as_finetuned() as tuned,
        backend.as_scaled_adapter(2.0) as scaled,
        backend.as_null_adapter(1) as null,
    ):
        for view in (plain, tuned, scaled, null):
            view.logprob_of("the sun", " rises")
            view.rolling_logprob("the sun rises")
            view.next_token_dist("the sun")
            view.generate("the sun", max_new_tokens=3)
            view.generate("the sun", max_new_tokens=3, temperature=0.7)
            view.model(view.tokenizer("the sun", return_tensors="pt")["input_ids"])
            assert backend.changes() == []
    assert backend.preflight_finite_check() == (True, "")
    assert backend.changes() == []


def test_a_closed_backend_is_no_longer_compared(build: Any, base: Path) -> None:
    backend = build(base)
    backend.close()
    with pytest.raises(BackendClosedError, match="was used after it was closed"):
        backend.changes()


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "transposed": lambda torch: torch.arange(2400.0).view(40, 60).t(),
    "transposed and small": lambda torch: torch.arange(6.0).view(2, 3).t(),
    "channels last": lambda torch: torch.arange(480.0).view(2, 3, 8, 10).to(memory_format=torch.channels_last),
    "sliced": lambda torch: torch.arange(8000.0).view(80, 100)[:, ::2],
    "sliced and small": lambda torch: torch.arange(12.0).view(3, 4)[:, ::2],
    "expanded": lambda torch: torch.arange(40.0).view(40, 1).expand(40, 3),
    "of one element": lambda torch: torch.ones(1).expand(5, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_write_through_data_is_found_in_any_layout_of_memory(layout: str) -> None:
    import torch

    from pytest_sway.backends.hf.inspection import TensorsRecord

    tensor = LAYOUTS[layout](torch)
    assert not tensor.is_contiguous()
    record = TensorsRecord({"weight": ({"weight": tensor}, "weight")}, "parameter")
    assert record.changes() == []
    tensor.data[(0,) * tensor.dim()] += 1
    assert record.changes() == ["parameter weight: contents changed"]
