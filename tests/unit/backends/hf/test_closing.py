from __future__ import annotations

import functools
import gc
import resource
import sys
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.hygiene.memory import WeightsWatch
from pytest_sway.errors import BackendClosedError, ScoringError
from tests.tiny import make_base
from tests.unit.backends.hf.insides import WAIT, adapter_in, base_in, held_up
from tests.unit.fakes import Call, Gate

if TYPE_CHECKING:
    from collections.abc import Iterator

KEEP: list[Any] = []


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    KEEP.clear()


def test_a_closed_backend_says_so(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as view:
        backend.close()
        with pytest.raises(BackendClosedError, match=r"was used after it was closed.* Ask for it again"):
            view.logprob_of("the sun", " rises")
        with pytest.raises(BackendClosedError):
            _ = view.model
    with pytest.raises(BackendClosedError), backend.as_base():
        pass
    with pytest.raises(BackendClosedError):
        backend.sizes()
    backend.close()


def test_a_close_in_two_threads_releases_each_share(build: Any, base: Path, adapter: Path) -> None:
    class Share:
        def __init__(self) -> None:
            self.value, self.released = types.SimpleNamespace(closed=False), False

        def release(self) -> None:
            gate.pass_through()
            self.released = True

    gate, backend = Gate(), build(base, adapter)
    backend._shares += (shares := [Share(), Share()])
    calls = [Call(backend.close), Call(backend.close)]
    gate.wait()
    gate.open()
    for call in calls:
        call.result()
    assert [share.released for share in shares] == [True, True]


@pytest.mark.parametrize("step", ["_let_go", "_release"])
def test_a_close_that_was_interrupted_is_finished_by_the_next(
    build: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    backend = build(base, adapter)
    loaded = base_in(backend)
    usual = getattr(backend, step)

    def interrupted(_: Any) -> None:
        monkeypatch.setattr(backend, step, usual)
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.close()
    assert not loaded.closed
    backend.close()
    assert loaded.closed


def test_backends_and_views_keep_no_weights(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as tuned, backend.as_null_adapter(1) as null, backend.as_scaled_adapter(2) as scaled:
        views = [tuned, null, scaled]
        for view in views:
            view.logprob_of("the sun", " rises")
        backend.close()
    assert backend.leak() is None
    assert len(views) == 3


def test_an_adapter_is_freed_without_a_collection(build: Any, base: Path, adapter: Path) -> None:
    backend, _plain = build(base, adapter), build(base)
    with backend.as_finetuned() as tuned, backend.as_null_adapter(1) as null:
        tuned.logprob_of("the sun", " rises")
        assert null.model is not tuned.model
    adapter_memory = WeightsWatch(adapter_in(backend).own.values())
    assert adapter_memory.alive_bytes() > 0
    gc.disable()
    try:
        backend.close()
        assert adapter_memory.alive_bytes() == 0
        assert [watch.alive_bytes() for watch in backend._watches] == [0] * len(backend._watches)
    finally:
        gc.enable()


of_tuned_and_null = pytest.mark.parametrize(
    "opened",
    [lambda backend: backend.as_finetuned(), lambda backend: backend.as_null_adapter(1)],
    ids=["tuned", "null"],
)


@of_tuned_and_null
def test_a_model_asked_for_during_the_close_says_that_the_backend_is_closed(
    build: Any, base: Path, adapter: Path, opened: Any
) -> None:
    class ClosedWhileWeWait:
        def __enter__(self) -> None:
            backend.close()

        def __exit__(self, *error: object) -> None: ...

    backend = build(base, adapter)
    with opened(backend) as view:
        backend._loaded.lock = ClosedWhileWeWait()
        with pytest.raises(BackendClosedError):
            _ = view.model
    assert backend.leak() is None


@of_tuned_and_null
def test_a_backend_closed_while_a_view_scores_in_another_thread_frees_its_weights_after_that(
    build: Any, base: Path, adapter: Path, opened: Any
) -> None:
    backend = build(base, adapter)
    with ThreadPoolExecutor(1) as pool, opened(backend) as view:
        expected = view.next_token_dist("the sun", top_k=3).logprobs.tolist()
        with held_up(view) as begun:
            dist = pool.submit(view.next_token_dist, "the sun", top_k=3)
            assert begun.wait(WAIT)
            backend.close()
        assert dist.result(WAIT).logprobs.tolist() == expected
        del dist
        with pytest.raises(BackendClosedError):
            view.logprob_of("the sun", " rises")
    assert backend.leak() is None


def test_a_tree_that_a_test_keeps_is_reported_with_its_holder_and_the_bytes_that_it_takes(
    build: Any, base: Path, adapter: Path
) -> None:
    backend = build(base, adapter)
    nbytes = sum(backend.sizes().values())
    with backend.as_finetuned() as view:
        mine = view.model
        view.logprob_of("the sun", " rises")
    backend.close()
    leak = backend.leak()
    assert leak is not None
    assert 0.95 * nbytes <= leak.nbytes <= 1.05 * nbytes
    assert any("local 'mine'" in holder and "PeftModelForCausalLM" in holder for holder in leak.holders), leak
    del mine
    assert backend.leak() is None


def _double(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(2)


def test_what_a_test_wrote_into_a_tree_that_it_keeps_is_reported_too(build: Any, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view:
        mine = view.model
        _double(mine)
    backend.close()
    leak = backend.leak()
    assert leak is not None
    assert any("local 'mine' -> LlamaForCausalLM" in holder for holder in leak.holders), leak
    del mine
    assert backend.leak() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_very_many_views_with_models_leave_nothing_behind(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)

    def use(count: int) -> tuple[int, int]:
        for _ in range(count):
            for opened in (backend.as_base, backend.as_finetuned):
                with opened() as view:
                    assert view.model.device.type == "cpu"
        gc.collect()
        shared = base_in(backend).watches, adapter_in(backend).pristine.watches
        alive = [watch for watches in shared for watch in watches.all() if watch.alive()]
        return len(alive), sum(len(watches.all()) for watches in shared)

    alive, _ = use(20)
    before = _resident()
    assert use(300)[0] == alive
    assert use(0)[1] <= 40
    assert _resident() - before < 30_000_000


def test_an_error_leaves_the_variables_of_one_that_was_being_handled(build: Any, base: Path) -> None:
    def failing_test() -> None:
        mine = "kept"
        raise ValueError(mine)

    with build(base).as_base() as view:
        try:
            failing_test()
        except ValueError:
            with pytest.raises(ScoringError) as caught:
                view.next_token_dist("the", top_k=0)
    handled = caught.value.__context__
    assert handled is not None
    frames = [frame for frame, _ in traceback.walk_tb(handled.__traceback__)]
    assert frames[-1].f_locals == {"mine": "kept"}


def test_only_the_last_to_close_answers_for_the_base(build: Any, base: Path, adapter: Path) -> None:
    first, second = build(base, adapter), build(base)
    with second.as_base() as view:
        KEEP.append(view.model)
    first.close()
    assert first.leak() is None
    second.close()
    leak = second.leak()
    assert leak is not None
    assert leak.nbytes >= sum(p.nbytes for p in KEEP[0].parameters())


@pytest.mark.parametrize(("in_a_cycle", "expected"), [(False, []), (True, [1])])
def test_a_collection_for_each_base_only_if_its_weights_are_in_a_cycle_of_references(
    build: Any,
    base: Path,
    adapter: Path,
    other_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_a_cycle: bool,
    expected: list[int],
) -> None:
    collections: list[int] = []
    first, second = build(base, adapter), build(base, other_adapter)
    for backend in (first, second):
        with backend.as_finetuned() as view:
            assert view.logprobs_of([("the sun", " rises"), ("paris", " is")])
            if in_a_cycle:
                model = view.model
                model.itself = [model]
                del model
    collect = gc.collect

    def collecting(*args: Any) -> int:
        collections.append(1)
        return collect()

    monkeypatch.setattr(gc, "collect", collecting)
    first.close()
    assert collections == []
    second.close()
    assert collections == expected
    assert second.leak() is None


def test_a_changed_backend_can_still_be_closed(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as view:
        view.model.merge_adapter()
        view.model.train()
        view.model.base_model.model.model.layers[0].register_forward_hook(lambda *args: None)
    backend.close()
    assert backend.leak() is None


def test_a_model_that_was_unloaded_can_still_be_closed(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as view:
        view.model.merge_and_unload()
    backend.close()
    assert backend.leak() is None


def _model(build: Any, base: Path, adapter: Path) -> tuple[Any, Any]:
    backend = build(base, adapter)
    with backend.as_finetuned() as view:
        return backend, view.model


def test_a_global_that_holds_the_model_is_named(build: Any, base: Path, adapter: Path) -> None:
    gc.unfreeze()  # frozen objects, such as this module, are invisible to the search
    backend, model = _model(build, base, adapter)
    KEEP.append(model)
    del model
    backend.close()
    leak = backend.leak()
    gc.freeze()
    assert leak is not None
    assert leak.nbytes > 0
    assert f"module {__name__} global 'KEEP' -> list -> PeftModelForCausalLM" in leak.holders
    KEEP.clear()
    assert backend.leak() is None


def test_all_globals_of_a_module_that_hold_a_model_are_named(
    build: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, model = _model(build, base, adapter)
    first, second = ModuleType("first_module"), ModuleType("second_module")
    for module in (first, second):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(first).update(ONE=model, TWO=model, KEPT={"model": model})
    vars(second).update({name: [model] for name in "ABCDE"})
    del model
    backend.close()
    leak = backend.leak()
    assert leak is not None
    assert set(leak.holders) >= {
        "module first_module globals 'ONE', 'TWO' -> PeftModelForCausalLM",
        "module first_module global 'KEPT' -> dict -> PeftModelForCausalLM",
        "module second_module globals 'A', 'B', 'C' and 2 more -> list -> PeftModelForCausalLM",
    }


@pytest.mark.parametrize("opened", ["as_base", "as_finetuned", "as_scaled_adapter"])
def test_a_call_that_still_runs_is_named_by_its_thread(build: Any, base: Path, adapter: Path, opened: str) -> None:
    backend = build(base, adapter)
    arguments = (0.5,) if opened == "as_scaled_adapter" else ()
    with ThreadPoolExecutor(1, thread_name_prefix="scorer") as pool, getattr(backend, opened)(*arguments) as view:
        view.next_token_dist("the moon")
        with held_up(view) as begun:
            call = pool.submit(view.next_token_dist, "the sun")
            assert begun.wait(WAIT)
            backend.close()
            leak = backend.leak()
        call.result(WAIT)
    del call
    assert leak is not None
    assert leak.holders == ("a call that is still running in thread 'scorer_0'",)
    assert backend.leak() is None


def test_a_local_that_holds_a_weight_is_named(build: Any, base: Path, adapter: Path) -> None:
    backend, model = _model(build, base, adapter)
    mine = [parameter for name, parameter in model.named_parameters() if "lora_A" in name][:1]
    del model
    backend.close()
    leak = backend.leak()
    assert leak is not None
    assert leak.nbytes == mine[0].nbytes
    assert any("frame test_a_local_that_holds_a_weight_is_named" in h and "local 'mine'" in h for h in leak.holders)
    mine.clear()
    assert backend.leak() is None


def test_a_closure_and_a_cache_that_hold_the_model_are_named(build: Any, base: Path, adapter: Path) -> None:
    backend, model = _model(build, base, adapter)

    def outer(held: Any) -> Any:
        return lambda: held

    @functools.lru_cache
    def cached() -> Any:
        return KEEP[0]()

    KEEP.append(outer(model))
    cached()
    del model
    backend.close()
    leak = backend.leak()
    assert leak is not None
    assert any("closure of" in holder and "outer" in holder for holder in leak.holders), leak
    assert any("functools.lru_cache of" in holder and "cached" in holder for holder in leak.holders), leak


def test_the_last_traceback_is_named(build: Any, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, model = _model(build, base, adapter)

    def failing_test(mine: Any) -> None:
        raise RuntimeError(type(mine).__name__)

    with pytest.raises(RuntimeError, match=r"Peft") as caught:
        failing_test(model)
    del model
    monkeypatch.setattr(sys, "last_traceback", caught.value.__traceback__, raising=False)
    backend.close()
    leak = backend.leak()
    assert leak is not None
    assert any(h.startswith("sys.last_traceback -> frame failing_test") and "local 'mine'" in h for h in leak.holders)


def test_sizes_are_what_the_tensors_take(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as view:
        parameters = dict(view.model.named_parameters())
    lora = sum(p.nbytes for name, p in parameters.items() if "lora_" in name)
    rest = sum(p.nbytes for name, p in parameters.items() if "lora_" not in name)
    base_bytes, adapter_bytes = backend.sizes().values()
    assert adapter_bytes == lora
    assert rest <= base_bytes <= rest + 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_converted_base_goes_back_to_the_system(build: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path, hidden=1024, layers=4, dtype="bfloat16")
    build(base).close()
    before = _resident()
    backend = build(base)
    nbytes = sum(backend.sizes().values())
    backend.close()
    assert nbytes > 100_000_000
    assert _resident() - before < 0.1 * nbytes


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
