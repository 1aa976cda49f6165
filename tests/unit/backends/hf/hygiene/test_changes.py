"""A test's changes to its own models and tokenizers affect no other test; changes to shared parts are found."""

from __future__ import annotations

import functools
import shutil
import tempfile
from contextlib import closing
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.hygiene.contents import ContentsRecord, PatchRecord
from pytest_sway.errors import AdapterMismatchError, BackendClosedError
from tests.tiny import TEXT, make_adapter, make_tokenizer, poison, quiet
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PROMPT, ANSWER = "the sun rises in the", " east and sets"


@pytest.fixture
def builder(loads: list[str]) -> HFBuilder:
    """A builder without answer caches, so that every answer is computed."""
    return HFBuilder(on_base_load=lambda name, seconds: loads.append(name), score_cache=0)


def _scored(view: Any) -> tuple[Any, ...]:
    return (
        view.logprob_of(PROMPT, ANSWER),
        view.rolling_logprob(TEXT).total_logprob,
        view.generate(TEXT, max_new_tokens=3),
    )


def _answers(*backends: Any) -> list[Any]:
    """Return the logits of both sides of some backends."""
    found = []
    for backend in backends:
        for opened in (backend.as_base, backend.as_finetuned):
            with opened() as view:
                found.append((view_logits(view).tolist(), _scored(view)))
    return found


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _weight(model: Any) -> Any:
    projection = _inner(model).model.layers[0].self_attn.q_proj
    return getattr(projection, "base_layer", projection).weight


def _ids(tokenizer: Any) -> Any:
    return tokenizer(TEXT, return_tensors="pt")["input_ids"]


# --- what is a test's own ---------------------------------------------------------------------------------------------


def _in_place(model: Any, _: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def _through_numpy(model: Any, _: Any) -> None:
    _weight(model).detach().numpy()[:] = 1.0


def _through_the_storage(model: Any, _: Any) -> None:
    for parameter in model.parameters():
        parameter.untyped_storage().fill_(7)


def _new_parameter(model: Any, _: Any) -> None:
    import torch

    _inner(model).lm_head.weight = torch.nn.Parameter(torch.zeros_like(_inner(model).lm_head.weight))


def _buffers(model: Any, _: Any) -> None:
    _inner(model).model.rotary_emb.inv_freq.mul_(2)


def _resize(model: Any, _: Any) -> None:
    with quiet():
        _inner(model).resize_token_embeddings(200)


def _hooks(model: Any, _: Any) -> None:
    for layer in _inner(model).model.layers:
        layer.register_forward_hook(
            lambda *args: (args[2][0] * 2, *args[2][1:]) if isinstance(args[2], tuple) else args[2] * 2
        )


def _other_forward(model: Any, _: Any) -> None:
    for layer in _inner(model).model.layers:
        layer.mlp.forward = lambda states: states * 0


def _steps_of_training(model: Any, tokenizer: Any) -> None:
    import torch

    model.train()
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(_ids(tokenizer), labels=_ids(tokenizer)).loss.backward()
        optimizer.step()


def _trainer(model: Any, tokenizer: Any) -> None:
    import transformers

    pytest.importorskip("accelerate")
    model.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder, quiet():
        arguments = transformers.TrainingArguments(
            folder, max_steps=1, learning_rate=0.1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
        )
        rows = [{"input_ids": _ids(tokenizer)[0], "labels": _ids(tokenizer)[0]}]
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        trainer.evaluate()


def _prune(model: Any, _: Any) -> None:
    prune: Any = import_module("torch.nn.utils.prune")

    projection = _inner(model).model.layers[0].mlp.up_proj
    prune.l1_unstructured(getattr(projection, "base_layer", projection), "weight", amount=0.5)
    prune.remove(getattr(projection, "base_layer", projection), "weight")


def _parametrize(model: Any, _: Any) -> None:
    import torch

    torch.nn.utils.parametrizations.weight_norm(_inner(model).model.layers[1].mlp.down_proj)


def _outputs(model: Any, tokenizer: Any) -> None:
    _inner(model).set_attn_implementation("eager")
    model(_ids(tokenizer), output_hidden_states=True, output_attentions=True)
    model.generate(input_ids=_ids(tokenizer), max_new_tokens=2, return_dict_in_generate=True, output_scores=True)


def _pipeline(model: Any, tokenizer: Any) -> None:
    from transformers import pipeline

    with quiet():
        pipeline("text-generation", model=_inner(model), tokenizer=tokenizer)(
            [TEXT, PROMPT], max_new_tokens=2, batch_size=2
        )


def _other_state(model: Any, _: Any) -> None:
    model.load_state_dict({name: tensor * 0 for name, tensor in model.state_dict().items()})


def _layers_removed(model: Any, _: Any) -> None:
    del _inner(model).model.layers[1]


def _shared_with_processes(model: Any, _: Any) -> None:
    model.share_memory()
    _in_place(model, _)


def _checkpointing(model: Any, tokenizer: Any) -> None:
    with quiet():
        model.gradient_checkpointing_enable()
        model.train()
        model(_ids(tokenizer))


def _initialised(model: Any, _: Any) -> None:
    import torch

    model.apply(lambda module: torch.nn.init.normal_(module.weight) if hasattr(module, "weight") else None)


def _config(model: Any, _: Any) -> None:
    model.config.use_cache = False
    model.config.num_attention_heads = 1
    getattr(model.config, "rope_parameters", {})["rope_theta"] = 3.0  # since transformers 5
    model.generation_config.eos_token_id = 7
    model.generation_config.top_k = 3


def _settings(_: Any, tokenizer: Any) -> None:
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.chat_template = "{{ x }}"
    tokenizer.model_max_length = 3
    tokenizer.pad_token = tokenizer.bos_token = "sun"
    tokenizer.model_input_names.append("mine")
    tokenizer(TEXT, padding="max_length", truncation=True, max_length=7)


TO_ANY: dict[str, Callable[[Any, Any], object]] = {
    "in place": _in_place,
    "through .data": lambda m, t: _weight(m).data.mul_(2),
    "slightly": lambda m, t: m.get_input_embeddings().weight.data.mul_(1.0001),
    "through numpy": _through_numpy,
    "through the storage": _through_the_storage,
    "new data": lambda m, t: setattr(_weight(m), "data", _weight(m).data * 2),
    "new parameter": _new_parameter,
    "buffers": _buffers,
    "half": lambda m, t: m.half(),
    "double": lambda m, t: m.double(),
    "resize": _resize,
    "hooks": _hooks,
    "other forward": _other_forward,
    "train": lambda m, t: m.train(),
    "requires_grad": lambda m, t: m.requires_grad_(True),
    "steps of training": _steps_of_training,
    "Trainer": _trainer,
    "prune": _prune,
    "parametrize": _parametrize,
    "hidden states and attentions": _outputs,
    "pipeline": _pipeline,
    "another state": _other_state,
    "layers removed": _layers_removed,
    "shared with processes": _shared_with_processes,
    "gradient checkpointing": _checkpointing,
    "initialised anew": _initialised,
    "config": _config,
    "the tokenizer's settings": _settings,
}


class Shared(NamedTuple):
    """Two backends on one base, the answers of all their sides, and the bases loaded so far."""

    backend: Any
    other: Any
    before: list[Any]
    loads: list[str]

    def require_nothing_changed(self) -> None:
        assert self.backend.changes() == []
        assert self.other.changes() == []
        assert _answers(self.backend, self.other) == self.before
        assert len(self.loads) == 1


@pytest.fixture
def shared(build: Any, base: Path, adapter: Path, other_adapter: Path, loads: list[str]) -> Shared:
    backends = build(base, adapter), build(base, other_adapter)
    return Shared(*backends, _answers(*backends), loads)


@pytest.fixture(scope="module")
def kept(base: Path, adapter: Path, other_adapter: Path) -> Iterator[Shared]:
    """Shared by all tests that change only their own models."""
    loads: list[str] = []
    builder = HFBuilder(on_base_load=lambda name, seconds: loads.append(name), score_cache=0)
    one, other = (builder(spec_of(base, folder)) for folder in (adapter, other_adapter))
    with closing(one), closing(other):
        yield Shared(one, other, _answers(one, other), loads)


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
@pytest.mark.parametrize("change", TO_ANY)
def test_what_a_test_does_to_its_own_model_changes_nothing(kept: Shared, side: str, change: str) -> None:
    with getattr(kept.backend, side)() as view:
        before = _scored(view)
        TO_ANY[change](view.model, view.tokenizer)
        assert _scored(view) == before
        assert kept.backend.changes() == []
    kept.require_nothing_changed()


def _lora(model: Any) -> Any:
    return next(p for name, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in name)


def _scaling(model: Any, _: Any) -> None:
    scaling = model.base_model.model.model.layers[0].self_attn.q_proj.scaling
    for name in scaling:
        scaling[name] *= 2


def _add_adapter(model: Any, _: Any) -> None:
    from peft import LoraConfig

    with quiet():
        model.add_adapter("mine", LoraConfig(target_modules=["o_proj"]))
        model.set_adapter("mine")


def _delete_adapter(model: Any, _: Any) -> None:
    with quiet():
        model.delete_adapter(model.active_adapter)


def _adapter_off(model: Any, tokenizer: Any) -> None:
    with model.disable_adapter():
        model(_ids(tokenizer))
    model.base_model.disable_adapter_layers()


TO_PEFT: dict[str, Callable[[Any, Any], object]] = {
    "the adapter's weights": lambda m, t: _lora(m).data.mul_(2),
    "scaling": _scaling,
    "merge": lambda m, t: m.merge_adapter(),
    "merge and unload": lambda m, t: m.merge_and_unload(),
    "unload": lambda m, t: m.unload(),
    "add an adapter": _add_adapter,
    "delete the adapter": _delete_adapter,
    "turn it off": _adapter_off,
    "its config": lambda m, t: setattr(m.peft_config["default"], "r", 99),
}


@pytest.mark.parametrize("change", TO_PEFT)
def test_what_a_test_does_to_its_own_adapter_changes_nothing(kept: Shared, change: str) -> None:
    with kept.backend.as_finetuned() as view:
        before = _scored(view)
        TO_PEFT[change](view.model, view.tokenizer)
        assert _scored(view) == before
    kept.require_nothing_changed()


def test_an_attention_of_a_tests_own_changes_nothing(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AttentionInterface

    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    AttentionInterface.register("mine", lambda module, query, *_, **__: (query.transpose(1, 2) * 0, None))
    with shared.backend.as_base() as view, torch.inference_mode():
        before = view_logits(view)
        view.model.set_attn_implementation("mine")
        assert not view_logits(view).equal(before)
    shared.require_nothing_changed()


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
    backend = build(base, adapter)
    before = _answers(backend)
    with pytest.raises(AdapterMismatchError):
        build(base, poison(shutil.copytree(adapter, tmp_path / "copy")))
    assert backend.changes() == []
    assert _answers(backend) == before


@pytest.mark.parametrize("memory", ["copied on write", "exposed"])
def test_using_a_backend_changes_nothing(
    build: Any, base: Path, adapter: Path, memory: str, request: pytest.FixtureRequest
) -> None:
    if memory == "exposed":
        request.getfixturevalue("exposed")
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


# --- a tokenizer's object in Rust -------------------------------------------------------------------------------------


def _lowercase(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _bytes(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()


def _template(tokenizer: Any) -> None:
    from tokenizers import processors

    processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = processor


def _decoder(tokenizer: Any) -> None:
    from tokenizers import decoders

    tokenizer.backend_tokenizer.decoder = decoders.Fuse()


IN_RUST: dict[str, Callable[[Any], object]] = {
    "added tokens": lambda tokenizer: tokenizer.add_tokens(["quark"]),
    "normalizer": _lowercase,
    "pre-tokenizer": _bytes,
    "post-processor": _template,
    "decoder": _decoder,
}


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
@pytest.mark.parametrize("part", IN_RUST)
def test_a_change_in_the_tokenizers_rust_is_found_and_the_next_user_gets_a_clean_base(
    build: Any, base: Path, adapter: Path, loads: list[str], part: str, side: str
) -> None:
    backend, other = build(base, adapter), build(base)
    before = _answers(backend)
    with getattr(backend, side)() as view:
        IN_RUST[part](view.tokenizer)
    assert backend.changes() == [f"tokenizer: its {part} changed"]
    assert other.changes() == [f"tokenizer: its {part} changed"], "everyone on that base reports it"
    clean = build(base, adapter)
    assert clean.changes() == []
    assert _answers(clean) == before
    assert len(loads) == 2


def test_special_tokens_that_are_new_words_are_a_change(build: Any, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view:
        view.tokenizer.add_special_tokens({"additional_special_tokens": ["<mine>"]})
    assert backend.changes() == ["tokenizer: its added tokens changed"]


def test_a_changed_tokenizer_of_an_adapter_is_found_and_the_next_user_gets_a_clean_one(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "copy")
    make_tokenizer(folder, extra=("quark",))
    backend, plain = build(base, folder), build(base)
    with backend.as_finetuned() as view:
        view.tokenizer.add_tokens(["lepton"])
    assert plain.changes() == []
    assert backend.changes() == ["tokenizer: its added tokens changed"]
    clean = build(base, folder)
    assert clean.changes() == []
    with clean.as_finetuned() as view:
        assert len(view.tokenizer) == 92


# --- what is patched for the whole process ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3, 5)])
def test_a_write_is_found_in_tensors_of_every_width(shape: tuple[int, ...]) -> None:
    import torch

    dtypes = (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128)
    tensors = {str(dtype): torch.ones(shape, dtype=dtype) for dtype in dtypes}
    record = ContentsRecord(tensors)
    assert record.changes() == []
    for tensor in tensors.values():
        tensor.fill_(2)
    assert record.changes() == [f"{dtype}: contents changed" for dtype in dtypes]


def test_a_class_that_inherits_its_forward_inherits_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Parent(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    class Child(Parent):
        pass

    record, forward = PatchRecord(Child()), Parent.forward
    Child.forward = lambda self, x: 0 * x  # type: ignore[method-assign]
    record.restore()
    assert "forward" not in vars(Child)
    Parent.forward = lambda self, x: 2 * x  # type: ignore[method-assign]
    record.restore()
    assert "forward" not in vars(Child)
    assert Parent.forward is forward


def _plainly(_original: Any) -> Callable[[Any], Any]:
    return lambda function: function


@pytest.mark.parametrize("wraps", [_plainly, functools.wraps])
def test_a_class_whose_forward_was_patched_is_found_once_and_put_back(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, wraps: Callable[[Any], Any]
) -> None:
    with shared.backend.as_base() as view:
        before = _scored(view)
        kind = type(view.model.model.layers[0].mlp)
        monkeypatch.setattr(kind, "forward", wraps(kind.forward)(lambda self, states: states * 0))
        assert _scored(view) != before
    line = f"class {kind.__module__}.{kind.__qualname__}: its forward was replaced"
    assert shared.backend.changes() == [line]
    shared.require_nothing_changed()


@pytest.mark.parametrize("wraps", [_plainly, functools.wraps])
def test_an_attention_function_that_was_replaced_is_found_once_and_put_back(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, wraps: Callable[[Any], Any]
) -> None:
    from transformers import AttentionInterface

    functions = AttentionInterface._global_mapping
    monkeypatch.setitem(functions, "sdpa", functions["sdpa"])
    zeros = wraps(functions["sdpa"])(lambda module, query, *_, **__: (query.transpose(1, 2) * 0, None))
    AttentionInterface.register("sdpa", zeros)
    assert shared.backend.changes() == ["transformers' attention function 'sdpa': it was replaced"]
    shared.require_nothing_changed()


def test_a_hook_on_all_modules_is_found_once_and_taken_off(shared: Shared) -> None:
    from torch.nn.modules.module import register_module_forward_hook

    handle = register_module_forward_hook(lambda module, args, output: None)
    try:
        assert shared.backend.changes() == ["torch's global forward hooks: 1 added"]
        shared.require_nothing_changed()
    finally:
        handle.remove()


def test_a_hook_on_all_modules_that_was_there_before_the_load_stays(build: Any, base: Path) -> None:
    from torch.nn.modules.module import register_module_forward_hook

    seen: list[Any] = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        backend = build(base)
        assert backend.changes() == []
        with backend.as_base() as view:
            seen.clear()
            view.logprob_of(PROMPT, ANSWER)
        assert seen
    finally:
        handle.remove()


@pytest.mark.parametrize("what", ["a class's forward", "a hook on all modules"])
def test_what_was_patched_while_the_base_was_loaded_and_is_no_longer_is_not_put_back(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from torch.nn.modules.module import register_module_forward_hook
    from transformers.models.llama.modeling_llama import LlamaMLP

    seen: list[Any] = []
    forward: Any = LlamaMLP.forward

    def patched(self: Any, states: Any) -> Any:
        seen.append(self)
        return forward(self, states)

    if what == "a hook on all modules":
        handle = register_module_forward_hook(lambda module, *_: seen.append(module))
        backend = build(base)
        handle.remove()
    else:
        monkeypatch.setattr(LlamaMLP, "forward", patched)
        backend = build(base)
        monkeypatch.undo()
    try:
        assert backend.changes() == []
        seen.clear()
        with backend.as_base() as view:
            view.logprob_of(PROMPT, ANSWER)
        assert seen == []
    finally:
        LlamaMLP.forward = forward  # type: ignore[method-assign]
        if what == "a hook on all modules":
            handle.remove()


# --- exposed memory ---------------------------------------------------------------------------------------------------

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
WRITES: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "in place": (lambda m, t: _add_one(_weight(m)), Q_PROJ),
    "through .data": (lambda m, t: _weight(m).data.mul_(2), Q_PROJ),
    "slightly, through .data": (
        lambda m, t: m.get_input_embeddings().weight.data.mul_(1.0001),
        "model.embed_tokens.weight",
    ),
    "a band of columns, through .data": (lambda m, t: _zero(_weight(m).data[:, 13:17]), Q_PROJ),
    "a band of rows, through .data": (lambda m, t: _zero(_weight(m).data[13:17]), Q_PROJ),
    "one row, in place": (lambda m, t: _add_one(_weight(m)[3]), Q_PROJ),
    "one element, in place": (lambda m, t: _add_one(_weight(m)[3, 5]), Q_PROJ),
    "through numpy": (_through_numpy, Q_PROJ),
    "through the storage": (lambda m, t: _weight(m).untyped_storage().fill_(7), Q_PROJ),
}


def _zero(tensor: Any) -> None:
    tensor.zero_()


def _add_one(tensor: Any) -> None:
    import torch

    with torch.no_grad():
        tensor.add_(1)


@pytest.mark.usefixtures("exposed")
@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_exposed_memory_is_found_and_the_next_user_gets_a_clean_base(
    build: Any, base: Path, adapter: Path, loads: list[str], write: str, side: str
) -> None:
    backend = build(base, adapter)
    before, (change, name) = _answers(backend), WRITES[write]
    with getattr(backend, side)() as view:
        change(view.model, view.tokenizer)
    assert backend.changes() == [f"{name}: contents changed"]
    assert backend.changes() == [f"{name}: contents changed"]
    backend.close()
    clean = build(base, adapter)
    assert clean.changes() == []
    assert _answers(clean) == before
    assert len(loads) == 2


@pytest.mark.usefixtures("exposed")
def test_a_write_to_an_adapters_exposed_memory_is_found(build: Any, base: Path, adapter: Path) -> None:
    backend, other = build(base, adapter), build(base)
    with backend.as_finetuned() as view:
        _lora(view.model).data.mul_(2)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert backend.changes() == [f"adapter: {name}: contents changed"]
    assert other.changes() == []


@pytest.mark.usefixtures("exposed")
@pytest.mark.parametrize("change", ["hooks", "other forward", "train", "requires_grad", "config", "new parameter"])
def test_with_exposed_memory_only_writes_are_changes(shared: Shared, change: str) -> None:
    with shared.backend.as_finetuned() as view:
        TO_ANY[change](view.model, view.tokenizer)
    shared.require_nothing_changed()


@pytest.mark.usefixtures("exposed")
def test_an_adapter_that_rewrites_its_base_does_not_write_to_exposed_memory(
    build: Any, base: Path, adapter: Path, tmp_path: Path
) -> None:
    backend = build(base, adapter)
    before = _answers(backend)
    folder = make_adapter(tmp_path, base, init_lora_weights="pissa")
    with build(base, folder).as_finetuned() as view:
        assert view_logits(view).equal(logits(*fresh(base, folder)))
    assert backend.changes() == []
    assert _answers(backend) == before


@pytest.mark.usefixtures("exposed")
def test_many_changes_are_counted(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as tuned:
        for parameter in tuned.model.parameters():
            parameter.data.add_(1)
        count = len(list(tuned.model.parameters()))
    assert len(backend.changes()) == 11
    assert backend.changes()[-1] == f"and {count - 10} more"


@pytest.mark.usefixtures("exposed")
def test_everyone_on_a_changed_base_reports_it_and_the_next_gets_another(
    build: Any, base: Path, adapter: Path, other_adapter: Path, loads: list[str]
) -> None:
    first, second, third = build(base, adapter), build(base, other_adapter), build(base)
    with first.as_base() as view:
        _weight(view.model).data.mul_(2)
    for backend in (third, first, second):
        assert backend.changes() == [f"{Q_PROJ}: contents changed"]
    assert build(base, other_adapter).changes() == []
    assert len(loads) == 2


@pytest.mark.usefixtures("exposed")
def test_a_change_stays_found_when_adapters_come_and_go(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    first, second = build(base, adapter), build(base, other_adapter)
    with first.as_base() as view:
        _weight(view.model).data.mul_(2)
    second.close()
    assert first.changes() == [f"{Q_PROJ}: contents changed"]


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

    from pytest_sway.backends.hf.hygiene.contents import ContentsRecord

    tensor = LAYOUTS[layout](torch)
    assert not tensor.is_contiguous()
    record = ContentsRecord({"weight": tensor})
    assert record.changes() == []
    tensor.data[(0,) * tensor.dim()] += 1
    assert record.changes() == ["weight: contents changed"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_write_to_the_scales_that_bitsandbytes_keeps_beside_a_weight_is_found(nested: bool) -> None:
    import torch

    inner = SimpleNamespace(absmax=torch.ones(4), code=torch.ones(16), offset=None, state2=None)
    weight: Any = torch.zeros(64, dtype=torch.uint8)
    weight.quant_state = SimpleNamespace(absmax=torch.ones(8), code=torch.ones(16), offset=torch.ones(()), state2=inner)
    record = ContentsRecord({"weight": weight})
    assert record.changes() == []
    (inner if nested else weight.quant_state).absmax[2] = 3
    assert record.changes() == [f"weight (scales, {4 if nested else 1}): contents changed"]


def test_what_was_written_and_put_back_is_no_change() -> None:
    import torch

    from pytest_sway.backends.hf.hygiene.contents import ContentsRecord

    tensor = torch.arange(8000.0)
    record = ContentsRecord({"weight": tensor})
    tensor.add_(1)
    assert record.changes() == ["weight: contents changed"]
    tensor.sub_(1)
    assert record.changes() == []
