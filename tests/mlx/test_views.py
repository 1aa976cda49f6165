"""A view's answers stay equal to the bit while other views work."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from pytest_sway.backends.hf.sampling import processors
from pytest_sway.backends.mlx.model.sampling import filtered, penalised
from pytest_sway.backends.questions import SamplingParams
from pytest_sway.errors import BackendClosedError, BackendUseError, NoAdapterError, ScoringError, ViewClosedError
from pytest_sway.protocols import (
    BatchView,
    NullCalibratedBackend,
    PreflightCheckable,
    RawView,
    ScalableDifferentialBackend,
)
from tests.mlx.native import fresh_logits, make_native, view_logits
from tests.tiny import edit_weights

Build = Callable[..., Any]
PAIR = ("the sun rises in the", " east and sets in the west .")


def test_the_base_view_is_bit_equal_to_the_base_and_the_other_is_not(build: Build, base: Path, adapter: Path) -> None:
    expected = fresh_logits(base)
    with build(base, adapter).as_base() as plain, build(base, adapter).as_finetuned() as tuned:
        for _ in range(2):
            assert np.array_equal(view_logits(plain), expected)
            assert not np.allclose(view_logits(tuned), expected, atol=1e-3)


def test_views_of_two_adapters_of_one_base_take_turns(
    build: Build, base: Path, adapter: Path, other_adapter: Path, loads: list[str]
) -> None:
    one, two = build(base, adapter), build(base, other_adapter)
    with one.as_base() as plain, one.as_finetuned() as first, two.as_finetuned() as second:
        alone = [view.logprob_of(*PAIR) for view in (plain, first, second)]
        assert [view.logprob_of(*PAIR) for view in (plain, first, second)] == alone
        assert [view.logprob_of(*PAIR) for view in (second, plain, first)] == [alone[2], *alone[:2]]
    assert len(set(alone)) == 3
    assert loads == [str(base)]


def test_views_in_many_threads_answer_as_alone(build: Build, base: Path, adapter: Path, other_adapter: Path) -> None:
    one, two = build(base, adapter), build(base, other_adapter)
    with one.as_base() as plain, one.as_finetuned() as first, two.as_finetuned() as second:
        views = [plain, first, second]
        alone = [view.logprob_of(*PAIR) for view in views]
        found: dict[int, set[float]] = {i: set() for i in range(3)}

        def ask(i: int) -> None:
            for _ in range(20):
                found[i].add(views[i].logprob_of(*PAIR))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == {i: {logprob} for i, logprob in enumerate(alone)}


def test_a_closed_backend_leaves_the_base_to_the_others(
    build: Build, base: Path, adapter: Path, other_adapter: Path
) -> None:
    one, two = build(base, adapter), build(base, other_adapter)
    with two.as_base() as plain, one.as_finetuned() as first:
        expected = plain.logprob_of(*PAIR)
        assert first.model is not plain.model
        one.close()
        assert plain.logprob_of(*PAIR) == expected
        with pytest.raises(BackendClosedError, match="was used after it was closed"):
            first.logprob_of(*PAIR)
        assert two.changes() == []


def test_a_view_after_its_block_says_so(build: Build, base: Path) -> None:
    with build(base).as_base() as view:
        pass
    with pytest.raises(ViewClosedError, match="the view 'base' was used after its `with` block"):
        view.logprob_of(*PAIR)


def test_a_base_alone_has_no_fine_tuned_side(build: Build, base: Path) -> None:
    with pytest.raises(NoAdapterError, match="needs an adapter, but the spec"), build(base).as_finetuned():
        pass


def test_a_scaled_adapter_goes_from_the_base_to_the_adapter_and_on(build: Build, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        ends = plain.logprob_of(*PAIR), tuned.logprob_of(*PAIR)
        with backend.as_scaled_adapter(0.0) as none, backend.as_scaled_adapter(1.0) as all_of_it:
            assert (none.logprob_of(*PAIR), all_of_it.logprob_of(*PAIR)) == pytest.approx(ends, abs=1e-6)
        with backend.as_scaled_adapter(2.0) as twice:
            assert twice.id == "scaled_2.00"
            assert twice.logprob_of(*PAIR) not in ends
        assert tuned.logprob_of(*PAIR) == ends[1]
        assert backend.changes() == []


def test_a_scaled_adapter_is_the_adapter_with_its_matrices_scaled(
    build: Build, base: Path, adapter: Path, tmp_path: Path
) -> None:
    scaled = Path(shutil.copytree(adapter, tmp_path / "scaled"))

    def halve(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.mul_(0.5)

    edit_weights(scaled, halve)
    with build(base, adapter).as_scaled_adapter(0.5) as half, build(base, scaled).as_finetuned() as expected:
        assert half.logprob_of(*PAIR) == pytest.approx(expected.logprob_of(*PAIR), abs=1e-5)


def test_a_null_adapter_is_noise_that_its_seed_decides(build: Build, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    found = []
    for seed in (3, 3, 4):
        with backend.as_null_adapter(seed, init_scale=0.2) as null:
            assert null.id == f"null_{seed}"
            found.append(null.logprob_of(*PAIR))
    with backend.as_base() as plain, backend.as_finetuned() as tuned:
        assert found[0] == found[1]
        assert len({*found, plain.logprob_of(*PAIR), tuned.logprob_of(*PAIR)}) == 4
    assert backend.changes() == []


def test_noise_has_the_deviation_that_was_asked_for(build: Build, base: Path, adapter: Path) -> None:
    with build(base, adapter).as_null_adapter(1, init_scale=0.02, rank_scale=4.0) as null:
        layer = null.model.model.layers[0].self_attn.q_proj
        assert float(mx.std(mx.concatenate([layer.lora_a.flatten(), layer.lora_b.flatten()]))) == pytest.approx(
            0.04, rel=0.2
        )


@pytest.mark.parametrize("rank_scale", [0.0, -1.0, float("nan")])
def test_a_rank_scale_without_meaning_is_refused(build: Build, base: Path, adapter: Path, rank_scale: float) -> None:
    noise = build(base, adapter).as_null_adapter(0, rank_scale=rank_scale)
    with pytest.raises(ValueError, match="rank_scale must be positive"), noise:
        pass


def test_a_full_fine_tune_has_nothing_to_scale(build: Build, base: Path, tmp_path: Path) -> None:
    backend = build(base, make_native(tmp_path / "full", base, kind="full"))
    with pytest.raises(BackendUseError, match="as_scaled_adapter needs a LoRA adapter"), backend.as_scaled_adapter(0.5):
        pass


def test_sampling_is_decided_by_its_seed_alone(build: Build, base: Path) -> None:
    settings = {"max_new_tokens": 8, "temperature": 1.0}
    with build(base).as_base() as view:
        first = view.generate("the sun", seed=1, **settings)
        mx.random.seed(99)
        state = mx.random.state[0].tolist()
        assert view.generate("the sun", seed=1, **settings) == first
        assert mx.random.state[0].tolist() == state
        texts = view.generate_many(["the sun"] * 6, seed=[1, 2, 3, 4, 5, 6], **settings)
        assert texts[0] == first
        assert len(set(texts)) > 1


def test_a_small_nucleus_leaves_only_the_most_probable_token(build: Build, base: Path) -> None:
    with build(base).as_base() as view:
        greedy = view.generate("the sun", max_new_tokens=8)
        assert view.generate("the sun", max_new_tokens=8, temperature=2.0, top_p=1e-6, seed=5) == greedy


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 3}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "temperature": 0.7}, {"top_k": 99}],
)
def test_what_is_sampled_from_is_what_transformers_samples_from(settings: dict[str, Any]) -> None:
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 3
    asked = SamplingParams.of(stop=(), **{"max_new_tokens": 1, "temperature": 1.0} | settings)
    expected = scores
    for step in processors(asked, [(0,)], [0])[:-1]:  # all but the noise
        expected = step(None, expected)
    found = np.array(filtered(mx.array(scores[0].numpy()), asked))
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-6)


def test_a_repetition_penalty_is_that_of_transformers() -> None:
    scores = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    asked = SamplingParams.of(max_new_tokens=1, stop=(), repetition_penalty=1.7)
    (step,) = processors(asked, [(1, 1, 5)], [0])
    expected = step(torch.tensor([[1, 1, 5, 8]]), scores)[0].numpy()
    np.testing.assert_allclose(np.array(penalised(mx.array(scores[0].numpy()), (1, 1, 5, 8), 1.7)), expected, rtol=1e-6)


def test_samples_are_drawn_from_the_distribution_of_the_next_token(build: Build, base: Path) -> None:
    with build(base).as_base() as view:
        dist = view.next_token_dist("the sun", top_k=1000)
        texts = view.generate_many(["the sun"] * 400, max_new_tokens=1, temperature=1.0, seed=list(range(400)))
        likely = view.tokenizer.decode([int(dist.token_ids[0])])
    assert texts.count(likely) / 400 == pytest.approx(float(np.exp(dist.logprobs[0])), abs=0.08)


def test_many_answers_come_in_the_order_of_the_questions(build: Build, base: Path) -> None:
    pairs = [PAIR, ("the cat", " sat"), PAIR]
    with build(base).as_base() as view:
        assert view.logprobs_of(pairs) == [view.logprob_of(*pair) for pair in pairs]
        assert view.logprobs_of([]) == []
        both = view.next_token_dists(["the cat", "the sun"], top_k=2)
        assert [list(dist.token_ids) for dist in both] == [
            list(view.next_token_dist(prompt, top_k=2).token_ids) for prompt in ("the cat", "the sun")
        ]


def test_a_completion_of_no_tokens_has_no_logprob(build: Build, base: Path) -> None:
    with build(base).as_base() as view, pytest.raises(ScoringError, match="has no tokens after the prompt"):
        view.logprob_of("the sun", "")


def test_the_protocols_are_satisfied(build: Build, base: Path, adapter: Path) -> None:
    backend = build(base, adapter)
    assert isinstance(backend, ScalableDifferentialBackend)
    assert isinstance(backend, NullCalibratedBackend)
    assert isinstance(backend, PreflightCheckable)
    assert backend.preflight_finite_check() == (True, "")
    with backend.as_finetuned() as view:
        assert isinstance(view, RawView)
        assert isinstance(view, BatchView)


def test_the_identity_names_base_and_adapter(build: Build, base: Path, adapter: Path) -> None:
    assert build(base, adapter).cache_identity() == f"mlx:{base}:{adapter}"


def test_the_preflight_names_the_side_that_is_not_finite(
    build: Build, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = build(base, adapter)
    with backend.as_scaled_adapter(1e38) as view:
        assert not np.isfinite(view.logprob_of(*PAIR))
    assert backend.preflight_finite_check() == (True, "")
    monkeypatch.setattr("pytest_sway.backends.mlx.adapters.verification._TOKENS", 1)  # else the load would be refused
    diverged = edit_weights(
        shutil.copytree(adapter, tmp_path / "diverged"),
        lambda tensors: {name: tensor * 0 + 1e38 for name, tensor in tensors.items()},
    )
    ok, reason = build(base, diverged).preflight_finite_check()
    assert not ok
    assert reason.startswith("the ft view gave 8 of 8 non-finite log-probabilities")
