"""Specs with broken files are refused, and the error says what is wrong."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.registry import Builder
from pytest_sway.errors import AdapterMismatchError, BackendNotAvailableError, SpecError, SwayError, WeightsError
from pytest_sway.spec.model_spec import ModelSpec
from tests.tiny import (
    edit_config,
    edit_weights,
    make_adapter,
    make_base,
    pickled,
    poison,
    quiet,
    truncate,
)
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.families import make_family
from tests.unit.backends.hf.insides import base_in, bases_in
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_sway.backends.hf.builder import HFBuilder


@pytest.fixture
def broken(tmp_path: Path, adapter: Path) -> Path:
    """A copy of the adapter, to be broken."""
    return shutil.copytree(adapter, tmp_path / "broken")


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


CHECKED = [
    pytest.param(shutil.rmtree, SpecError, "the adapter '.*broken' does not exist", id="no folder"),
    pytest.param(_remove("adapter_config.json"), SpecError, "has no adapter_config.json", id="no config"),
    pytest.param(_write("adapter_config.json", "{"), SpecError, "cannot be read as JSON", id="config is no JSON"),
    pytest.param(_write("adapter_config.json", "[]"), SpecError, "names no peft_type", id="config is no object"),
    pytest.param(_write("adapter_config.json", "{}"), SpecError, "names no peft_type", id="no peft_type"),
    pytest.param(
        _remove("adapter_model.safetensors"),
        WeightsError,
        "has no weights: expected adapter_model.safetensors",
        id="no weights",
    ),
    pytest.param(truncate, WeightsError, "truncated or corrupt: its tensor", id="truncated"),
    pytest.param(_write("adapter_model.safetensors", "x"), WeightsError, "1 bytes, too few", id="one byte"),
    pytest.param(pickled, WeightsError, "only in adapter_model.bin, a pickle.* set allow_pickle=True", id="pickle"),
    pytest.param(
        lambda folder: edit_config(folder, task_type="SEQ_CLS"),
        AdapterMismatchError,
        "'SEQ_CLS' in its .*head",
        id="head",
    ),
    pytest.param(
        lambda folder: edit_config(folder, task_type="causal_lm"),
        AdapterMismatchError,
        "for the task causal_lm .*which PEFT does not have",
        id="task",
    ),
]


@pytest.mark.parametrize(("damage", "error", "text"), CHECKED)
def test_what_the_files_show_is_found_before_anything_is_loaded(
    builder: HFBuilder, base: Path, broken: Path, loads: list[str], damage: Any, error: type[Exception], text: str
) -> None:
    damage(broken)
    for use in (builder.check, builder):
        with pytest.raises(error, match=text):
            use(spec_of(base, broken))
    assert loads == []


def test_a_base_that_does_not_exist(builder: HFBuilder, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"the base '.*nowhere' does not exist. Name a hub id"):
        builder.check(spec_of(tmp_path / "nowhere"))


@pytest.mark.parametrize("role", ["base", "fine-tuned model"])
def test_a_model_that_was_saved_without_its_tokenizer(
    builder: HFBuilder, base: Path, tmp_path: Path, loads: list[str], role: str
) -> None:
    alone = shutil.copytree(base, tmp_path / "alone", ignore=shutil.ignore_patterns("*token*"))
    spec = spec_of(alone) if role == "base" else spec_of(base, finetuned=str(alone))
    with pytest.raises(SpecError, match=rf"the {role} '.*alone' has no tokenizer .*\.save_pretrained\('.*alone'\)\.$"):
        builder.check(spec)


def _offline(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr(import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", offline)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            ModelSpec(base="org/nowhere", device="cpu", dtype="fp32"),
            "the base 'org/nowhere' is neither a folder in .* nor in this machine's",
        ),
        (
            ModelSpec(base="org/nowhere", revision="v2", device="cpu", dtype="fp32"),
            "cache of the hub in revision 'v2', and this run is offline",
        ),
    ],
)
def test_offline_a_base_that_would_have_to_be_fetched_is_refused(
    builder: HFBuilder, monkeypatch: pytest.MonkeyPatch, spec: ModelSpec, sentence: str
) -> None:
    _offline(monkeypatch, True)
    with pytest.raises(WeightsError, match=sentence):
        builder.check(spec)
    _offline(monkeypatch, False)
    builder.check(spec)


def test_offline_a_fine_tuned_model_that_would_have_to_be_fetched_is_refused(
    builder: HFBuilder, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offline(monkeypatch, True)
    with pytest.raises(
        WeightsError, match=r"the fine-tuned model 'org/nowhere' is neither a folder in .* nor in this machine's"
    ):
        builder.check(ModelSpec(base=str(base), finetuned="org/nowhere", device="cpu", dtype="fp32"))


def test_a_base_that_is_an_adapter(builder: HFBuilder, adapter: Path) -> None:
    with pytest.raises(SpecError, match=r"has no config.json.* It holds an adapter; name it as 'adapter'"):
        builder.check(spec_of(adapter))


def test_an_adapter_that_is_a_whole_model(builder: HFBuilder, base: Path) -> None:
    with pytest.raises(
        SpecError, match=r"has no adapter_config\.json\. .* It holds a whole model; name it as 'finetuned'"
    ):
        builder.check(spec_of(base, base))


def test_a_base_without_weights(builder: HFBuilder, tmp_path: Path) -> None:
    (make_base(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has no weights: expected model.safetensors"):
        builder.check(spec_of(tmp_path))


def test_a_truncated_base(builder: HFBuilder, tmp_path: Path, loads: list[str]) -> None:
    path = make_base(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"truncated or corrupt"):
        builder(spec_of(tmp_path))
    assert loads == []


def test_a_pickled_base_is_read_only_on_request(build: Any, builder: HFBuilder, base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    copied = shutil.copytree(base, tmp_path / "copy")
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"only as a pickle \(pytorch_model.bin\).* set allow_pickle=True"):
        builder.check(spec_of(copied))
    with build(copied, allow_pickle=True).as_base() as view:
        assert view_logits(view).equal(logits(*fresh(base)))


def test_a_pickled_adapter_is_read_on_request(build: Any, base: Path, broken: Path, adapter: Path) -> None:
    with build(base, pickled(broken), allow_pickle=True).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, adapter)))


def test_a_pickled_adapter_shares_its_base(
    build: Any, base: Path, broken: Path, other_adapter: Path, loads: list[str]
) -> None:
    backends = [build(base, folder, allow_pickle=True) for folder in (other_adapter, pickled(broken))]
    assert len(loads) == 1
    assert [backend.changes() for backend in backends] == [[], []]


def test_a_pickle_that_cannot_be_read_is_named(build: Any, base: Path, broken: Path, loads: list[str]) -> None:
    (pickled(broken) / "adapter_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(WeightsError, match=r"adapter_model.bin' cannot be read as tensors: .* as safetensors"):
        build(base, broken, allow_pickle=True)
    assert loads == []


def test_a_pickle_of_other_things_than_tensors_is_refused(build: Any, base: Path, broken: Path) -> None:
    import torch

    torch.save({"step": 3}, pickled(broken) / "adapter_model.bin")
    with pytest.raises(WeightsError, match=r"adapter_model.bin' is not a dictionary of tensors"):
        build(base, broken, allow_pickle=True)


def test_a_base_that_brings_code_needs_leave_to_run_it(builder: HFBuilder, tmp_path: Path) -> None:
    path = make_base(tmp_path) / "config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "homemade"}
    path.write_text(json.dumps(config))
    with pytest.raises(SpecError, match=r"brings its own code .* set trust_remote_code=True"):
        builder.check(spec_of(tmp_path))


@pytest.mark.parametrize("library", ["torch", "peft"])
def test_a_missing_library_is_named_with_what_installs_it(
    builder: HFBuilder, base: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    from pytest_sway.backends.hf.loading import libraries

    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == library else object())
    with pytest.raises(BackendNotAvailableError, match=rf"needs {library}, which.* pip install 'pytest-sway\[hf\]'"):
        builder.check(spec_of(base))


def test_an_adapter_for_a_deeper_model_is_refused_by_headers(
    builder: HFBuilder, base: Path, tmp_path: Path, loads: list[str]
) -> None:
    deeper = make_base(tmp_path / "deeper", layers=3)
    adapter = make_adapter(tmp_path / "adapter", deeper)
    with pytest.raises(AdapterMismatchError, match=r"2 of the 6 modules .* not in the base \(model.layers.2.self_attn"):
        builder.check(spec_of(base, adapter))
    assert loads == []


def test_an_adapter_for_a_wider_model_is_refused_by_headers(builder: HFBuilder, base: Path, tmp_path: Path) -> None:
    wider = make_base(tmp_path / "wider", hidden=64)
    adapter = make_adapter(tmp_path / "adapter", wider)
    with pytest.raises(
        AdapterMismatchError, match=r"have other sizes .*lora_A is for 64 features, the base has 32 x 32"
    ):
        builder.check(spec_of(base, adapter))


def _rename(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("base_model.model.", "base_model.model.other."): tensor for name, tensor in tensors.items()}


def _drop_one(tensors: dict[str, Any]) -> None:
    del tensors[min(tensors)]


def _infinite(tensors: dict[str, Any]) -> None:
    tensors[min(tensors)].fill_(float("inf"))


def _zero_a(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensor.zero_()


def _narrow(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor[:2].clone() if "lora_A" in name else tensor[:, :2].clone() for name, tensor in tensors.items()}


LOADED = [
    pytest.param(
        _rename, r"4 of the 4 modules .* are not in the base \(other.model.layers.0.self_attn.q_proj", id="other names"
    ),
    pytest.param(
        _drop_one, r"1 places in the base have no tensor in it \(base_model.model.model.layers.0", id="incomplete"
    ),
    pytest.param(
        _infinite,
        "NaN or infinite values in 1 of its 8 tensors .model.layers.0.self_attn.q_proj.lora_A.weight",
        id="inf",
    ),
    pytest.param(_zero_a, "changes nothing on the base .*A, B or the scaling is zero", id="A zero"),
    pytest.param(_narrow, "does not fit the base .*size mismatch", id="another rank than its config says"),
]


@pytest.mark.parametrize("on_used_base", [False, True], ids=["first", "second"])
@pytest.mark.parametrize(("change", "text"), LOADED)
def test_an_adapter_that_does_not_do_what_it_says_is_refused_and_leaves_no_trace(
    build: Any, base: Path, adapter: Path, broken: Path, change: Any, text: str, on_used_base: bool
) -> None:
    edit_weights(broken, change)
    plain = build(base, adapter if on_used_base else None)
    with pytest.raises(AdapterMismatchError, match=text):
        build(base, broken)
    assert plain.changes() == []
    with plain.as_base() as view:
        assert view_logits(view).equal(logits(*fresh(base)))
    with build(base, adapter).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, adapter)))


def test_tensors_that_the_config_does_not_speak_of_are_named(build: Any, base: Path, broken: Path) -> None:
    edit_config(broken, target_modules=["q_proj"])
    with pytest.raises(AdapterMismatchError, match=r"4 of its tensors have no place in the base .*v_proj.lora_A"):
        build(base, broken)


def test_a_nan_is_named(build: Any, base: Path, broken: Path) -> None:
    with pytest.raises(AdapterMismatchError, match=r"NaN or infinite .*q_proj.lora_A.weight\). Its training diverged"):
        build(base, poison(broken))


def test_an_adapter_that_was_never_trained_is_refused(build: Any, base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterMismatchError, match=r"changes nothing .* Was it saved before it was trained"):
        build(base, make_adapter(tmp_path, base, zero_b=True))


def test_an_embedding_adapter_that_was_never_trained_is_refused(build: Any, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, base, zero_b=True, targets=("embed_tokens", "q_proj"))
    edit_weights(adapter, lambda tensors: {n: t for n, t in tensors.items() if "lora_" in n})
    with pytest.raises(AdapterMismatchError, match=r"changes nothing"):
        build(base, adapter)


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize(
    "fields",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [5, 6]}}],
    ids=str,
)
def test_what_starts_as_a_copy_of_the_base_does_not_count_as_trained(
    build: Any, base: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    with quiet():
        adapter = make_adapter(tmp_path, base, zero_b=True, **fields)
    with pytest.raises(AdapterMismatchError, match=r"changes nothing .* Was it saved before it was trained"):
        build(base, adapter)


def test_dora_whose_magnitudes_alone_were_trained_is_accepted(build: Any, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, base, zero_b=True, use_dora=True)
    edit_weights(adapter, lambda tensors: {n: t * 2 if "magnitude" in n else t for n, t in tensors.items()})
    with build(base, adapter).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, adapter)))


def test_an_adapter_whose_scaling_is_zero_is_refused(build: Any, base: Path, broken: Path) -> None:
    with pytest.raises(AdapterMismatchError, match=r"changes nothing .* scaling is zero"):
        build(base, edit_config(broken, lora_alpha=0))


def test_a_nan_that_is_written_into_the_base_is_named(build: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", attention_bias=True)
    with quiet():
        adapter = make_adapter(tmp_path / "adapter", base, bias="all")

    def change(tensors: dict[str, Any]) -> None:
        tensors[min(name for name in tensors if "q_proj" in name and "lora" not in name)].fill_(float("nan"))

    edit_weights(adapter, change)
    with pytest.raises(AdapterMismatchError, match=r"NaN or infinite values in 1 of .*q_proj\S*bias"):
        build(base, adapter)


def test_a_base_with_an_adapter_in_its_folder_is_refused(
    build: Any, builder: HFBuilder, base: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_sway.backends.hf import check

    other = make_base(tmp_path / "other", seed=7)
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(make_adapter(tmp_path / "adapter", other), both, dirs_exist_ok=True)
    with pytest.raises(SpecError, match=r"both' holds an adapter .* which transformers would attach"):
        builder.check(spec_of(both))
    monkeypatch.setattr(check, "base_file", lambda spec, name: None)  # as for a base on a hub
    with pytest.raises(SpecError, match=r"both' holds an adapter .* which transformers would attach"):
        build(both)
    assert loads == []


def test_a_base_that_cannot_be_looked_at_any_more_is_given_back(
    build: Any, builder: HFBuilder, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(base)
    loaded = base_in(first)

    def fail() -> list[str]:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(loaded, "changes", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        build(base, adapter)
    first.close()
    assert loaded.closed
    assert bases_in(builder) == []


def test_an_unknown_type_is_named(build: Any, base: Path, broken: Path) -> None:
    edit_config(broken, peft_type="TELEPATHY")
    with pytest.raises(
        SpecError, match=r"of the type 'TELEPATHY' \(peft_type in .*, which the installed PEFT .* does not know"
    ):
        build(base, broken)


def test_targets_that_the_base_lacks_are_named(build: Any, base: Path, broken: Path, loads: list[str]) -> None:
    edit_weights(
        broken,
        lambda tensors: {n.replace("q_proj", "c_attn").replace("v_proj", "c_proj"): t for n, t in tensors.items()},
    )
    edit_config(broken, target_modules=["c_attn", "c_proj"])
    with pytest.raises(AdapterMismatchError, match=r"does not fit the base .*c_attn"):
        build(base, broken)
    assert loads == []


def test_a_failed_load_leaves_nothing_in_memory(build: Any, base: Path, broken: Path, loads: list[str]) -> None:
    import gc

    import torch

    def linear_layers() -> list[Any]:
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Linear)]

    poison(broken)
    before = linear_layers()  # keeps them alive, so that no id is reused
    errors: list[SwayError] = []
    for _ in range(2):
        with pytest.raises(AdapterMismatchError) as caught:
            build(base, broken)
        errors.append(caught.value)
    gc.collect()
    known = {id(layer) for layer in before}
    assert [layer for layer in linear_layers() if id(layer) not in known] == []
    assert len(loads) == 2


def test_errors_are_permanent_where_a_second_try_would_fail(builder: HFBuilder, base: Path, broken: Path) -> None:
    truncate(broken)
    with pytest.raises(SwayError) as caught:
        builder.check(spec_of(base, broken))
    assert caught.value.permanent


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("size mismatch"), False),
        (OSError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_from_other_errors(base: Path, error: Exception, ran_out: bool) -> None:
    import torch

    builder = Builder()
    builder(ModelSpec(base=str(base), device="cpu", dtype="fp32")).close()
    assert builder.exhausted(error) is ran_out
    assert builder.exhausted(torch.OutOfMemoryError("full"))


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "xla:7"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    builder: HFBuilder, base: Path, loads: list[str], device: str
) -> None:
    with pytest.raises(SpecError, match=rf"the device '{device}' cannot be used here: .*\. Ask for 'auto'"):
        builder.check(ModelSpec(base=str(base), device=device, dtype="fp32"))
    assert loads == []


@pytest.mark.filterwarnings("ignore:the adapter .* was trained on:pytest_sway.SwayWarning")
def test_an_adapter_for_another_architecture_is_refused_and_harms_nobody(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    gpt2 = make_family(tmp_path / "gpt2", "gpt2")
    stranger = make_adapter(tmp_path / "stranger", gpt2, targets=("c_attn",), fan_in_fan_out=True)
    backend = build(base, adapter)
    with pytest.raises(AdapterMismatchError, match="does not fit the base"):
        build(base, stranger)
    assert backend.changes() == []
    with pytest.raises(AdapterMismatchError, match=r"does not fit the base .*[qv]_proj"):
        build(gpt2, adapter)
