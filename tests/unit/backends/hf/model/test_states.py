from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import BackendUseError
from tests.tiny import make_adapter
from tests.unit.backends.hf.insides import WAIT, computing_model, held_up
from tests.unit.backends.hf.reference import fresh, logits, view_logits

if TYPE_CHECKING:
    from pathlib import Path

PROMPT, ANSWER = "the sun rises in the", " east and sets in the west ."


def _score(view: Any) -> float:
    score: float = view.logprob_of(PROMPT, ANSWER)
    return score


def test_views_of_several_adapters_are_right_in_any_order(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    first, second, plain = build(base, adapter), build(base, other_adapter), build(base)
    with (
        first.as_base() as a,
        first.as_finetuned() as b,
        second.as_finetuned() as c,
        plain.as_base() as d,
        first.as_scaled_adapter(0.0) as e,
    ):
        views = [a, b, c, d, e]
        expected = [_score(view) for view in views]
        assert len({round(score, 4) for score in expected}) == 3
        assert expected[0] == expected[3]
        assert expected[4] == pytest.approx(expected[0], abs=1e-5)
        for i in (1, 0, 2, 4, 3, 2, 1, 4, 0):
            assert _score(views[i]) == expected[i]


def test_views_are_right_in_threads(build: Any, base: Path, adapter: Path, other_adapter: Path) -> None:
    first, second = build(base, adapter), build(base, other_adapter)
    with first.as_base() as a, first.as_finetuned() as b, second.as_finetuned() as c, first.as_null_adapter(1) as d:
        views = [a, b, c, d]
        expected = [_score(view) for view in views]
        together = threading.Barrier(4)

        def work(i: int) -> list[float]:
            together.wait()
            return [_score(views[(i + k) % 4]) for k in range(12)]

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(4)))
    for i, scores in enumerate(results):
        assert scores == [expected[(i + k) % 4] for k in range(12)]


def test_the_raw_model_keeps_its_views_state_while_others_score(
    build: Any, base: Path, adapter: Path, other_adapter: Path
) -> None:
    first, second = build(base, adapter), build(base, other_adapter)
    expected = logits(*fresh(base, adapter))
    with first.as_finetuned() as tuned, first.as_base() as plain, second.as_finetuned() as other:
        model = tuned.model
        for view in (plain, other, tuned):
            _score(view)
            assert logits(model, tuned.tokenizer).equal(expected)
        assert view_logits(plain).equal(logits(*fresh(base)))


def test_adapters_that_come_and_go_leave_the_raw_model_in_its_state(
    build: Any, base: Path, adapter: Path, other_adapter: Path, tmp_path: Path
) -> None:
    expected = logits(*fresh(base, adapter))
    with build(base, adapter).as_finetuned() as tuned:
        model = tuned.model
        others = [build(base, other_adapter), build(base, make_adapter(tmp_path, base, targets=("o_proj",)))]
        assert logits(model, tuned.tokenizer).equal(expected)
        for other in others:
            other.close()
        assert logits(model, tuned.tokenizer).equal(expected)


def test_what_was_toggled_by_hand_does_not_change_a_views_answers(build: Any, base: Path, adapter: Path) -> None:
    with build(base, adapter).as_finetuned() as tuned:
        expected = _score(tuned)
        model = tuned.model
        off = logits(*fresh(base))
        with model.disable_adapter():
            assert _score(tuned) == expected
            assert logits(model, tuned.tokenizer).equal(off)
        assert _score(tuned) == expected


def test_a_scaled_view_counts_the_adapter_so_many_times(build: Any, base: Path, adapter: Path) -> None:
    model, tokenizer = fresh(base, adapter)
    for module in model.modules():
        if "default" in (getattr(module, "scaling", None) if hasattr(module, "lora_A") else ()):  # type: ignore[operator]
            module.scaling["default"] *= 0.25
    backend = build(base, adapter)
    with backend.as_finetuned() as tuned, backend.as_scaled_adapter(0.25) as scaled:
        before = view_logits(tuned)
        assert view_logits(scaled).equal(logits(model, tokenizer))
        assert view_logits(tuned).equal(before)
    assert backend.changes() == []


def test_one_time_the_adapter_is_the_adapter(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_finetuned() as tuned, backend.as_scaled_adapter(1.0) as scaled:
        assert _score(tuned) == _score(scaled)


@pytest.mark.parametrize("rank_scale", [1.0, 0.5])
def test_a_null_view_has_dlm_sways_noise(build: Any, base: Path, adapter: Path, rank_scale: float) -> None:
    import torch

    model, tokenizer = fresh(base, adapter)
    generator = torch.Generator(device="cpu").manual_seed(5)
    with torch.no_grad():  # as dlm_sway.backends.hf draws it
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                noise = torch.randn(*parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(noise * (0.3 * rank_scale**0.5))
    backend = build(base, adapter)
    with backend.as_null_adapter(5, init_scale=0.3, rank_scale=rank_scale) as null:
        assert view_logits(null).equal(logits(model, tokenizer))
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))
    assert backend.changes() == []


@pytest.mark.parametrize("rank_scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rank_scale_must_be_positive_and_finite(build: Any, base: Path, adapter: Path, rank_scale: float) -> None:
    backend = build(base, adapter)
    with (
        pytest.raises(ValueError, match=r"rank_scale must be positive and finite"),
        backend.as_null_adapter(1, rank_scale=rank_scale),
    ):
        pass


def test_a_view_left_by_an_error_leaves_nothing_behind(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with pytest.raises(RuntimeError, match=r"mine"), backend.as_null_adapter(1) as null:  # noqa: PT012
        _ = null.model
        raise RuntimeError("mine")
    with backend.as_finetuned() as tuned:
        assert view_logits(tuned).equal(logits(*fresh(base, adapter)))
    assert backend.changes() == []


def test_a_view_used_inside_another_ones_work_is_right(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_null_adapter(1) as null, backend.as_finetuned() as tuned:
        expected = _score(null), _score(tuned)
        inside: list[Any] = []
        embeddings = computing_model(null).get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda *_: inside.append((_score(tuned), view_logits(tuned))))
        assert _score(null) == expected[0]
        handle.remove()
        assert inside[0][0] == expected[1]
        assert inside[0][1].equal(logits(*fresh(base, adapter)))
        assert (_score(null), _score(tuned)) == expected


@pytest.mark.parametrize(("outer", "inner"), [(0.5, 0.5), (2.0, 0.0), (0.0, 2.0), (1.0, 0.5)])
def test_a_scaled_view_inside_a_scaled_view_counts_the_adapter_by_its_own_factor(
    build: Any, base: Path, adapter: Path, outer: float, inner: float
) -> None:
    backend = build(base, adapter)
    expected = {}
    for lam in (outer, inner):
        with backend.as_scaled_adapter(lam) as view:
            expected[lam] = _score(view), view_logits(view)
    assert outer == inner or expected[outer][0] != expected[inner][0]
    with backend.as_scaled_adapter(outer) as a, backend.as_scaled_adapter(inner) as b:
        for _ in range(2):
            for view, lam in ((a, outer), (b, inner)):
                assert _score(view) == expected[lam][0]
                assert view_logits(view).equal(expected[lam][1])


def test_scaled_views_in_threads_all_give_the_same_number(build: Any, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_scaled_adapter(0.5) as view:
        expected = _score(view)
    together = threading.Barrier(4)

    def work(_: int) -> list[float]:
        together.wait()
        scores = []
        for _ in range(50):
            with backend.as_scaled_adapter(0.5) as view:
                scores.append(_score(view))
        return scores

    with ThreadPoolExecutor(4) as pool:
        assert [score for scores in pool.map(work, range(4)) for score in scores] == [expected] * 200


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
def test_scoring_in_one_view_does_not_wait_for_another_view_of_the_same_side(
    build: Any, base: Path, adapter: Path, side: str
) -> None:
    opened = getattr(build(base, adapter), side)
    with opened() as slow, opened() as quick, ThreadPoolExecutor(1) as pool:
        expected = quick.rolling_logprob("a red cat").total_logprob
        with held_up(slow) as begun:
            held = pool.submit(_score, slow)
            assert begun.wait(WAIT)
            assert not held.done()
            assert quick.rolling_logprob("a blue dog").total_logprob != expected
            assert not held.done()
        assert held.result(WAIT) == _score(quick)


def test_one_view_is_used_by_several_threads_at_once(build: Any, base: Path, adapter: Path) -> None:
    with build(base, adapter).as_finetuned() as view, ThreadPoolExecutor(1) as pool:
        expected = _score(view)
        with held_up(view) as begun:
            held = pool.submit(_score, view)
            assert begun.wait(WAIT)
            assert _score(view) == expected
        assert held.result(WAIT) == expected


def test_other_types_cannot_be_scaled(build: Any, base: Path, tmp_path: Path) -> None:
    from peft import IA3Config

    from tests.tiny import save_adapter

    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    backend = build(base, save_adapter(tmp_path, base, config))
    with (
        pytest.raises(BackendUseError, match=r"as_scaled_adapter needs a LoRA adapter .* type IA3"),
        backend.as_scaled_adapter(0.5),
    ):
        pass
