"""Views share memory and nothing else: a test's changes to its model and its tokenizer end with the test."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map

from pytest_sway.backends.mlx import backend as backend_module
from pytest_sway.backends.mlx.model import placement
from pytest_sway.backends.mlx.model.libraries import mlx_lm_module
from pytest_sway.backends.mlx.model.shared_arrays import ClassesRecord
from pytest_sway.backends.mlx.model.trees import arrays_of
from pytest_sway.backends.registry import Builder
from pytest_sway.spec.model_spec import ModelSpec
from tests.mlx.native import LLAMA3, fresh_logits, logits, make_native, view_logits
from tests.tiny import TEXT, make_base

Build = Callable[..., Any]
PAIR = ("the sun rises in the", " east and sets in the west .")


def _ids(view: Any) -> Any:
    return mx.array([view.tokenizer.encode(TEXT)])


# --- what a view hands out --------------------------------------------------------------------------------------------


def test_base_and_adapter_are_two_models_whose_logits_differ_at_once(build: Build, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        base_model, tuned_model = plain.model, tuned.model
        assert base_model is not tuned_model
        difference = base_model(_ids(plain)) - tuned_model(_ids(tuned))
        assert float(mx.abs(difference).max()) > 1e-2
        assert np.array_equal(logits(base_model, plain.tokenizer), fresh_logits(base))


def test_the_base_models_modules_are_those_of_mlx_lm_without_an_adapter(
    build: Build, base: Path, adapter: Path
) -> None:
    lora = mlx_lm_module("tuner.lora").LoRALinear
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert isinstance(plain.model, mlx_lm_module("models.llama").Model)
        assert not any(isinstance(module, lora) for module in plain.model.modules())
        assert sum(isinstance(module, lora) for module in tuned.model.modules()) == 4


def test_model_and_tokenizer_are_the_same_while_the_view_is_open_and_its_own(
    build: Build, base: Path, adapter: Path
) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as one, backend.as_finetuned() as other:
        assert one.model is one.model
        assert one.tokenizer is one.tokenizer
        assert one.model is not other.model
        assert one.tokenizer is not other.tokenizer
        assert one.tokenizer._tokenizer is not other.tokenizer._tokenizer
        first = one.model
    with backend.as_finetuned() as later:
        assert later.model is not first


def test_threads_that_ask_one_view_at_once_get_one_model(build: Build, base: Path) -> None:
    with build(base).as_base() as view:
        models = _in_threads(4, lambda _: view.model)
        assert all(model is view.model for model in models)


def test_a_view_that_only_scores_hands_out_nothing(
    build: Build, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(name: str) -> None:
        make = getattr(backend_module, name)

        def count(given: Any) -> Any:
            made.append(name)
            return make(given)

        monkeypatch.setattr(backend_module, name, count)

    counted("own_tree_of")
    counted("own_tokenizer_of")
    with build(base, adapter).as_finetuned() as view:
        view.logprob_of(*PAIR)
        view.generate("the sun", max_new_tokens=2)
        assert made == []
        assert view.model is view.model
        assert view.tokenizer is view.tokenizer
    assert made == ["own_tree_of", "own_tokenizer_of"]


def test_a_handed_out_model_takes_no_memory_for_weights(build: Build, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as view, backend.as_scaled_adapter(0.5) as half:
        assert view.logprob_of(*PAIR) != half.logprob_of(*PAIR)
        gc.collect()
        before = mx.get_active_memory()
        models = view.model, half.model
        assert all(models)
        assert mx.get_active_memory() - before < 0.01 * sum(backend.sizes().values())


def test_the_trees_have_no_module_in_common(build: Build, base: Path, adapter: Path, tmp_path: Path) -> None:
    for folder in (adapter, make_native(tmp_path / "native", base)):
        backend = build(base, folder)
        with backend.as_base() as plain, backend.as_finetuned() as tuned, backend.as_scaled_adapter(0.5) as half:
            for view in (plain, tuned, half):
                view.logprob_of(*PAIR)
            sides = [backend._handed(view).side for view in (plain, tuned, half)]
            models = [view.model for view in (plain, tuned, half)] + [side.engine().model for side in sides]
            models += [side.model for side in sides]
            modules = [id(module) for model in models for module in model.modules()]
            assert len(modules) == len(set(modules))


# --- what a test can do to them ---------------------------------------------------------------------------------------


def _loss(model: Any, ids: Any) -> Any:
    return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()


def _train(view: Any, optimizer: Any) -> None:
    model, ids = view.model, _ids(view)
    gradient = nn.value_and_grad(model, _loss)
    for _ in range(3):
        _, gradients = gradient(model, ids)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def _train_compiled(view: Any) -> None:
    model, ids, optimizer = view.model, _ids(view), optimizers.Adam(learning_rate=0.05)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step() -> Any:
        loss, gradients = nn.value_and_grad(model, _loss)(model, ids)
        optimizer.update(model, gradients)
        return loss

    for _ in range(3):
        step()
        mx.eval(state)


def _train_new_lora(view: Any) -> None:
    view.model.freeze()
    mlx_lm_module("tuner.utils").linear_to_lora_layers(view.model, 1, {"rank": 2, "scale": 9.0, "dropout": 0.0})
    _train(view, optimizers.Adam(learning_rate=0.1))


def _attention(view: Any) -> Any:
    return view.model.model.layers[0].self_attn


def _write_everywhere(view: Any) -> None:
    for array in arrays_of(view.model).values():
        array[...] = 0.25
        mx.eval(array)


def _write_one_element(view: Any) -> None:
    weight = _attention(view).k_proj.weight
    weight[0, 0] = 50.0
    mx.eval(weight)


def _operate_in_place(view: Any) -> None:
    weight = view.model.model.norm.weight
    weight *= 3.0
    weight += 1.0
    mx.eval(weight)


def _scatter(view: Any) -> None:
    weight = view.model.model.embed_tokens.weight
    view.model.model.embed_tokens.weight = weight.at[mx.arange(4, 60), 3].add(2.0)


def _give_away_its_last_reference(view: Any) -> None:
    """Let MLX compute with an array that Python no longer refers to, so that MLX may reuse its memory."""
    projection = _attention(view).o_proj
    weight = projection.pop("weight")
    doubled = weight * 2.0
    del weight
    mx.eval(doubled)
    projection.weight = doubled


def _fuse(view: Any) -> None:
    for layer in view.model.model.layers:
        for name, module in layer.self_attn.named_modules():
            if hasattr(module, "fuse"):
                layer.self_attn[name] = module.fuse()
    _operate_in_place(view)


def _double_the_scale(view: Any) -> None:
    module = _attention(view).q_proj
    if hasattr(module, "scale"):
        module.scale *= 2.0
    else:
        module.weight = module.weight * 2.0


def _steer(view: Any) -> None:
    class Steered(nn.Module):  # type: ignore[misc]
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.block = block
            self.use_sliding = block.use_sliding

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.block(*args, **kwargs) + mx.arange(32)

    view.model.model.layers[0] = Steered(view.model.model.layers[0])


def _prune(view: Any) -> None:
    view.model.apply(lambda array: mx.where(mx.abs(array) < 0.2, 0.0, array))
    mx.eval(view.model.parameters())


CHANGING: dict[str, Callable[[Any], Any]] = {
    "update parameters": lambda view: view.model.update(tree_map(lambda array: array * 1.5, view.model.parameters())),
    "load_weights": lambda view: view.model.load_weights(
        [(name, array * 2) for name, array in tree_flatten(view.model.parameters())]
    ),
    "train with SGD": lambda view: _train(view, optimizers.SGD(learning_rate=0.5, momentum=0.9)),
    "train with AdamW": lambda view: _train(view, optimizers.AdamW(learning_rate=0.05)),
    "train with a compiled step": _train_compiled,
    "train a LoRA adapter of its own": _train_new_lora,
    "write to every array": _write_everywhere,
    "write to one element": _write_one_element,
    "operate in place": _operate_in_place,
    "scatter": _scatter,
    "give away the last reference": _give_away_its_last_reference,
    "quantize": lambda view: nn.quantize(view.model, group_size=32, bits=4),
    "fuse": _fuse,
    "scale the adapter": _double_the_scale,
    "steer": _steer,
    "prune": _prune,
    "cast": lambda view: view.model.set_dtype(mx.float16),
    "drop a layer": lambda view: view.model.model.layers.pop(),
    "swap two layers": lambda view: view.model.model.layers.reverse(),
    "replace a module": lambda view: _attention(view).update_modules({"k_proj": nn.Linear(32, 16, bias=False)}),
    "set an attribute": lambda view: setattr(_attention(view), "scale", 3.0),
    "change the rotary embeddings": lambda view: setattr(_attention(view).rope, "base", 50.0),
}


def _set_on_tokenizer(view: Any) -> None:
    wrapper, encoder = view.tokenizer, view.tokenizer._tokenizer
    wrapper.add_eos_token("east")
    wrapper._chat_template = lambda *_, **__: "east"
    wrapper.has_chat_template = True
    encoder.padding_side = "left"
    encoder.truncation_side = "left"
    encoder.model_max_length = 3
    encoder.pad_token = "sun"
    encoder.eos_token = "west"
    encoder.chat_template = "{{ 'east' }}"


def _change_the_arguments(view: Any) -> None:
    view.model.args.num_hidden_layers = 77
    view.model.args.tie_word_embeddings = True


KEEPING: dict[str, Callable[[Any], Any]] = {
    "freeze": lambda view: view.model.freeze(),
    "unfreeze": lambda view: view.model.freeze().unfreeze(keys=["weight"]),
    "training mode": lambda view: view.model.train(),
    "the arguments": _change_the_arguments,
    "the tokenizer": _set_on_tokenizer,
    "an attribute of its own": lambda view: setattr(view.model, "remembered", mx.zeros((4,))),
    "gradients": lambda view: mx.eval(nn.value_and_grad(view.model, _loss)(view.model, _ids(view))),
    "generate with mlx-lm": lambda view: mlx_lm_module("generate").generate(
        view.model, view.tokenizer, "the sun", max_tokens=4
    ),
    "a view of numpy that is only read": lambda view: np.array(view.model.model.norm.weight, copy=False).sum(),
}


class Measured:
    """A backend, and its answers before any change to a view's model."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.before = self.answers()

    def answers(self) -> list[Any]:
        """Return the views' answers and their models' logits, to the bit."""
        found: list[Any] = []
        for side in (self.backend.as_base, self.backend.as_finetuned, partial(self.backend.as_scaled_adapter, 0.5)):
            with side() as view:
                found += [view.logprob_of(*PAIR), view.generate("the sun", max_new_tokens=4)]
                found += [view_logits(view).tobytes(), view.model.training, view.model.args]
                found += [view.tokenizer.padding_side, view.tokenizer.eos_token_ids, view.tokenizer.has_chat_template]
        return found


@pytest.fixture(scope="module")
def measured(base: Path, adapter: Path) -> Iterator[Measured]:
    backend: Any = Builder()(ModelSpec(kind="mlx", base=str(base), adapter=adapter, device="cpu"))
    yield Measured(backend)
    backend.close()


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
@pytest.mark.parametrize("change", CHANGING.values(), ids=CHANGING)
def test_what_a_test_does_to_a_model_changes_that_model_alone(
    measured: Measured, change: Callable[[Any], Any], side: str
) -> None:
    with getattr(measured.backend, side)() as view, getattr(measured.backend, side)() as other:
        scored, computed, others = view.logprob_of(*PAIR), view_logits(view), other.model
        change(view)
        assert not np.array_equal(view_logits(view), computed)
        assert view.logprob_of(*PAIR) == scored
        assert np.array_equal(logits(others, other.tokenizer), computed)
        assert measured.answers() == measured.before
    assert measured.backend.changes() == []
    assert measured.answers() == measured.before


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
@pytest.mark.parametrize("use", KEEPING.values(), ids=KEEPING)
def test_changes_that_leave_the_numbers_alone_are_allowed(
    measured: Measured, use: Callable[[Any], Any], side: str
) -> None:
    with getattr(measured.backend, side)() as view:
        use(view)
        assert measured.answers() == measured.before
    assert measured.backend.changes() == []
    assert measured.answers() == measured.before


def test_all_settings_of_the_tokenizer_were_the_views_own(measured: Measured) -> None:
    with measured.backend.as_base() as view, measured.backend.as_base() as other:
        _set_on_tokenizer(view)
        assert view.tokenizer.padding_side == "left"
        assert view.tokenizer.apply_chat_template([{"role": "user", "content": "sun"}], tokenize=False) == "east"
        assert other.tokenizer.padding_side == "right"
        assert len(view.tokenizer.eos_token_ids) == len(other.tokenizer.eos_token_ids) + 1


def test_arrays_that_are_no_parameters_are_the_models_own_too(build: Build, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", rope_parameters=LLAMA3)
    backend = build(base)
    with backend.as_base() as view:
        expected = view_logits(view)
        frequencies = view.model.model.layers[0].self_attn.rope._freqs
        frequencies[...] = 1.0
        assert not np.array_equal(view_logits(view), expected)
    with backend.as_base() as view:
        assert np.array_equal(view_logits(view), expected)
    assert backend.changes() == []


def test_what_is_done_to_a_scaled_model_changes_no_other(measured: Measured) -> None:
    with measured.backend.as_scaled_adapter(0.5) as half, measured.backend.as_null_adapter(1) as noise:
        for view in (half, noise):
            _write_everywhere(view)
        assert measured.answers() == measured.before
    assert measured.backend.changes() == []


# --- what is still shared ---------------------------------------------------------------------------------------------


def test_a_write_past_mlx_is_found_and_the_base_is_not_served_again(
    build: Build, base: Path, adapter: Path, loads: list[str]
) -> None:
    backend, other = build(base, adapter), build(base)
    with backend.as_base() as view:
        np.array(view.model.model.norm.weight, copy=False)[3] += 1.0
    lines = ["base weight model.norm.weight: contents changed"]
    assert backend.changes() == lines
    assert backend.changes() == lines
    assert other.changes() == lines
    with build(base).as_base() as clean:
        assert np.array_equal(view_logits(clean), fresh_logits(base))
    assert loads == [str(base)] * 2


def test_a_write_past_mlx_to_an_adapter_is_found(build: Build, base: Path, adapter: Path) -> None:
    backend, other = build(base, adapter), build(base)
    with backend.as_finetuned() as view:
        np.array(_attention(view).q_proj.lora_b, copy=False)[0, 0] += 1.0
    assert backend.changes() == ["adapter weight model.layers.0.self_attn.q_proj.lora_b: contents changed"]
    assert other.changes() == []


def test_a_write_past_mlx_to_a_model_that_is_still_held_is_found_later(build: Build, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view:
        written = np.array(view.model.model.norm.weight, copy=False)
    assert backend.changes() == []
    written[3] += 1.0
    assert backend.changes() == ["base weight model.norm.weight: contents changed"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_write_past_mlx_is_found_in_every_dtype(build: Build, base: Path, dtype: str) -> None:
    backend = build(base, dtype=dtype)
    with backend.as_base() as view:
        np.array(view.model.model.norm.weight.view(mx.uint16), copy=False)[3] += 1
    assert backend.changes() == ["base weight model.norm.weight: contents changed"]


def test_a_class_that_computes_with_something_else_is_found(
    build: Build, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = build(base, adapter)
    with monkeypatch.context() as patched:
        patched.setattr(nn.RMSNorm, "__call__", lambda self, x: x)
        patched.setattr(mlx_lm_module("tuner.lora").LoRALinear, "__call__", lambda self, x: x)
        assert backend.changes() == [
            "class mlx_lm.tuner.lora.LoRALinear: its __call__ was replaced",
            "class mlx.nn.layers.normalization.RMSNorm: its __call__ was replaced",
        ]
    assert backend.changes() == []


def test_a_class_that_computes_nothing_is_not_found() -> None:
    assert ClassesRecord([nn.Module()]).changes() == []


def test_a_token_that_was_added_is_found(build: Build, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view:
        view.tokenizer._tokenizer.add_tokens(["zebra"])
    assert backend.changes() == ["tokenizer: its added tokens changed"]


# --- scaled adapters, and threads -------------------------------------------------------------------------------------


def test_a_scaled_adapter_inside_another_is_scaled_once(build: Build, base: Path, adapter: Path) -> None:
    backend, alone = build(base, adapter), {}
    for lam in (0.0, 0.5, 2.0):
        with backend.as_scaled_adapter(lam) as view:
            alone[lam] = view.logprob_of(*PAIR), view_logits(view).tobytes()
    with backend.as_scaled_adapter(2.0) as outer, backend.as_scaled_adapter(0.5) as half:
        models = [view.model for view in (outer, half)]
        with backend.as_scaled_adapter(0.0) as none:
            for lam, view in ((2.0, outer), (0.5, half), (0.0, none)):
                assert (view.logprob_of(*PAIR), view_logits(view).tobytes()) == alone[lam]
        assert models == [outer.model, half.model]


def _in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of ``work`` in several threads that start at the same moment."""
    start, found = threading.Barrier(count), dict[int, Any]()

    def run(i: int) -> None:
        start.wait(60)
        found[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [found[i] for i in range(count)]


def test_scaled_adapters_in_four_threads_are_each_as_alone(build: Build, base: Path, adapter: Path) -> None:
    backend, lams = build(base, adapter), (0.0, 0.5, 1.5, 2.0)

    def numbers(lam: float) -> Any:
        with backend.as_scaled_adapter(lam) as view:
            return view.logprob_of(*PAIR), view.next_token_dist("the sun").logprobs.tobytes()

    alone = [numbers(lam) for lam in lams]
    found = _in_threads(4, lambda i: {numbers(lams[i]) for _ in range(25)})
    assert found == [{numbers} for numbers in alone]
    assert len(set(alone)) == 4


def test_raw_models_and_views_in_four_threads_are_each_as_alone(build: Build, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        views = [plain, tuned, plain, tuned]

        def numbers(i: int) -> Any:
            return views[i].logprob_of(*PAIR) if i < 2 else view_logits(views[i]).tobytes()

        alone = [numbers(i) for i in range(4)]
        assert _in_threads(4, lambda i: {numbers(i) for _ in range(25)}) == [{numbers} for numbers in alone]
    assert backend.changes() == []


def test_training_beside_a_view_that_scores_changes_none_of_its_numbers(
    build: Build, base: Path, adapter: Path
) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as tuned:
        alone = tuned.logprob_of(*PAIR)

        def work(i: int) -> Any:
            if i < 2:
                return {tuned.logprob_of(*PAIR) for _ in range(25)}
            with backend.as_finetuned() as view:
                return _train(view, optimizers.Adam(learning_rate=0.1))

        assert _in_threads(4, work)[:2] == [{alone}, {alone}]
        assert tuned.logprob_of(*PAIR) == alone


def test_a_view_that_scores_keeps_no_other_one_waiting(build: Build, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    scored, inside, waited = threading.Event(), threading.Event(), []
    with backend.as_base() as plain, backend.as_finetuned() as tuned:

        def pass_that_waits(_: Any) -> None:
            inside.set()
            waited.append(scored.wait(60))

        thread = threading.Thread(target=plain._run, args=(pass_that_waits,))
        thread.start()
        assert inside.wait(60)
        tuned.logprob_of(*PAIR)
        scored.set()
        thread.join(60)
    assert waited == [True]


def test_where_a_second_device_is_used_one_thread_computes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(_: int = 0) -> bool:
        taken = placement._ONE_AT_A_TIME.acquire(blocking=False)
        if taken:
            placement._ONE_AT_A_TIME.release()
        return taken

    with placement.computing_on(mx.Device(mx.cpu)):
        assert _in_threads(1, free) == [True]
    monkeypatch.setattr(placement, "_in_use", {"Device(cpu, 0)", "Device(gpu, 0)"})
    with placement.computing_on(mx.Device(mx.cpu)):
        assert _in_threads(1, free) == [False]
    assert _in_threads(1, free) == [True]


# --- what a test keeps ------------------------------------------------------------------------------------------------

KEEP: list[Any] = []


@pytest.fixture(autouse=True)
def _keep_nothing() -> Iterator[None]:
    yield
    KEEP.clear()


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
def test_a_model_that_is_kept_is_a_leak_with_its_holder_until_it_goes(
    build: Build, base: Path, adapter: Path, side: str
) -> None:
    backend = build(base, adapter)
    nbytes = list(backend.sizes().values())
    with getattr(backend, side)() as view, getattr(backend, side)() as other:
        KEEP.extend([view.model, other.model])  # these share one memory
    backend.close()
    found = backend.leak()
    assert found is not None
    assert found.nbytes == (sum(nbytes) if side == "as_finetuned" else nbytes[0])
    assert any("global 'KEEP'" in holder and holder.endswith("Model") for holder in found.holders)
    del found
    KEEP.clear()
    assert backend.leak() is None


def test_a_base_kept_by_a_test_of_an_earlier_backend_is_reported_when_it_should_have_gone(
    build: Build, base: Path, adapter: Path, other_adapter: Path
) -> None:
    one, two = build(base, adapter), build(base, other_adapter)
    base_bytes, adapter_bytes = one.sizes().values()
    with one.as_finetuned() as view:
        KEEP.append(view.model)
    one.close()
    assert (leak := one.leak()) is not None
    assert leak.nbytes == adapter_bytes
    assert two.leak() is None
    two.close()
    assert (leak := two.leak()) is not None
    assert leak.nbytes == base_bytes
    assert any("global 'KEEP'" in holder for holder in leak.holders)


def test_a_model_that_is_kept_after_all_its_weights_were_replaced_is_no_leak(build: Build, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view:
        view.model.update(tree_map(lambda array: array * 1.5, view.model.parameters()))
        mx.eval(view.model.parameters())
        KEEP.append(view.model)
    backend.close()
    assert backend.leak() is None


def test_models_that_were_handed_out_leave_no_trace(build: Build, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    gc.collect()
    before = mx.get_active_memory()
    for _ in range(3):
        with backend.as_finetuned() as view:
            _train(view, optimizers.Adam(learning_rate=0.1))
        del view
        assert backend.changes() == []
    gc.collect()
    assert mx.get_active_memory() - before < 0.01 * sum(backend.sizes().values())
    backend.close()
    assert backend.leak() is None


def test_an_adapter_of_mlx_lm_is_put_on_a_tree_of_its_own(build: Build, base: Path, tmp_path: Path) -> None:
    for kind in ("lora", "dora", "full"):
        adapter = make_native(tmp_path / kind, base, kind=kind)
        backend = build(base, adapter)
        with backend.as_finetuned() as tuned:
            _write_everywhere(tuned)
        with backend.as_finetuned() as tuned, backend.as_base() as plain:
            assert np.array_equal(view_logits(tuned), fresh_logits(base, adapter))
            assert np.array_equal(view_logits(plain), fresh_logits(base))
