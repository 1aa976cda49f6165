"""Memory: shared weights are stored once, a close frees them, and running out of memory breaks nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.errors import CacheFullError, ScoringError
from tests.gpu.device import ON_CUDA, Peak, allocated, short_of_memory
from tests.gpu.models import texts
from tests.unit.backends.hf.insides import engine_of, passes_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_sway.cache.backend_cache import BackendCache

PROMPT, ANSWER = "the sun rises in the", " east"
TEXTS = texts([20, 100, 60, 30] * 12)
ROUNDING = 2**16
"""Bytes that a model may take besides its weights: small buffers, and the allocator's rounding."""
TOO_LITTLE_FOR_A_BASE = 200 * 2**20 if ON_CUDA else 100_000
TOO_LITTLE_FOR_A_BATCH = 96 * 2**20 if ON_CUDA else 200_000
TOO_LITTLE_FOR_A_TEXT = 2**20 if ON_CUDA else 2_000


def asked(backend: Any) -> list[float]:
    """Return the score of each view that a backend has."""
    sides = [backend.as_base] + ([] if backend.spec.adapter is None else [backend.as_finetuned])
    scores = []
    for side in sides:
        with side() as view:
            scores.append(view.logprob_of(PROMPT, ANSWER))
    return scores


def test_an_evicted_adapter_gives_its_memory_back(
    cache: BackendCache, medium: Path, medium_adapters: list[Path]
) -> None:
    with cache.lease({"base": medium}) as base:
        asked(base)
        before = allocated()
        with cache.lease({"base": medium, "adapter": medium_adapters[0]}) as backend:
            asked(backend)
            own = backend.sizes()
        assert allocated() > before + sum(own.values()) - sum(base.sizes().values()) - ROUNDING
        cache.evict_all()
        assert allocated() <= before + 0.01 * sum(base.sizes().values())
        asked(base)


def test_an_evicted_base_gives_its_memory_back(cache: BackendCache, medium: Path, medium_adapters: list[Path]) -> None:
    before = allocated()
    with cache.lease({"base": medium, "adapter": medium_adapters[0]}) as backend:
        asked(backend)
        nbytes = sum(backend.sizes().values())
        assert allocated() >= before + nbytes
    cache.evict_all()
    assert allocated() <= before + 0.01 * nbytes
    assert backend.leak() is None


def test_six_adapters_on_one_base_take_only_their_own_weights(
    new_cache: Callable[..., BackendCache], medium: Path, medium_adapters: list[Path]
) -> None:
    cache = new_cache(max_size=6)
    before, found, own = allocated(), [], []
    for adapter in medium_adapters:
        with cache.lease({"base": medium, "adapter": adapter}) as backend:
            asked(backend)
            base, *others = sorted(backend.sizes().values(), reverse=True)
        own.append(sum(others))
        found.append(allocated())
    assert found[-1] - found[0] <= 1.02 * sum(own[1:]) + 5 * ROUNDING
    assert found[-1] - before <= 1.01 * (base + sum(own)) + 6 * ROUNDING


def test_sizes_equal_the_estimate_and_the_allocated_memory(
    cache: BackendCache, medium: Path, medium_adapters: list[Path]
) -> None:
    spec = cache.resolve({"base": medium, "adapter": medium_adapters[0]})
    estimate = cache._build.check(spec).sizes
    before = allocated()
    with cache.lease(spec) as backend:
        sizes = backend.sizes()
        taken = allocated() - before
    assert estimate is not None
    assert estimate.keys() == sizes.keys()
    assert list(sizes.values()) == pytest.approx([estimate[part] for part in sizes], rel=0.01)
    assert sum(sizes.values()) <= taken <= 1.01 * sum(sizes.values()) + ROUNDING


def test_a_budget_of_bytes_is_kept_while_one_base_replaces_another(
    new_cache: Callable[..., BackendCache], medium: Path, other_medium: Path
) -> None:
    nbytes = sum(cache_sizes(new_cache(), medium))
    cache = new_cache(max_size=2, max_bytes=int(1.5 * nbytes))
    before, peak = allocated(), Peak()
    for base in (medium, other_medium):
        with cache.lease({"base": base}):
            pass
    assert [spec.base for spec in cache.loaded_specs()] == [str(other_medium)]
    assert peak.nbytes() - before <= 1.5 * nbytes


def cache_sizes(cache: BackendCache, base: Path) -> list[int]:
    sizes = cache._build.check(cache.resolve({"base": base})).sizes
    assert sizes is not None
    return list(sizes.values())


def test_a_load_that_runs_out_of_memory_evicts_idle_backends_and_succeeds(
    cache: BackendCache, medium: Path, other_medium: Path
) -> None:
    with cache.lease({"base": medium}) as first:
        asked(first)
    with short_of_memory(TOO_LITTLE_FOR_A_BASE) as failures, cache.lease({"base": other_medium}) as second:
        assert all(map(math.isfinite, asked(second)))
    assert failures
    assert [spec.base for spec in cache.loaded_specs()] == [str(other_medium)]


def test_a_load_without_enough_memory_is_an_error_and_changes_nothing(
    cache: BackendCache, medium: Path, other_medium: Path
) -> None:
    with cache.lease({"base": medium}) as first:
        scores, before = asked(first), allocated()
        with (
            short_of_memory(TOO_LITTLE_FOR_A_BASE) as failures,
            pytest.raises(CacheFullError, match=r"ran out of memory on device .* twice"),
        ):
            cache.get_or_load({"base": other_medium})
        assert failures
        assert allocated() <= before + 0.01 * sum(first.sizes().values())
        assert first.changes() == []
        assert asked(first) == scores
        with cache.lease({"base": other_medium}) as second:
            assert all(map(math.isfinite, asked(second)))


def test_a_batch_that_runs_out_of_memory_is_split(
    cache: BackendCache, medium: Path, medium_adapters: list[Path]
) -> None:
    with cache.lease({"base": medium, "adapter": medium_adapters[0]}) as backend, backend.as_finetuned() as view:
        expected = [rolled.total_logprob for rolled in view.rolling_logprobs(TEXTS)]
        with short_of_memory(TOO_LITTLE_FOR_A_BATCH) as failures:
            found = [rolled.total_logprob for rolled in view.rolling_logprobs(TEXTS)]
        assert failures
        assert found == pytest.approx(expected, rel=1e-4)
        assert [rolled.total_logprob for rolled in view.rolling_logprobs(TEXTS)] == pytest.approx(expected, rel=1e-5)


def test_a_text_without_enough_memory_is_an_error_and_the_next_text_is_scored(
    cache: BackendCache, medium: Path
) -> None:
    with cache.lease({"base": medium}) as backend, backend.as_base() as view:
        text = texts([3000 if ON_CUDA else 200], seed=1)[0]
        view.logprob_of(PROMPT, ANSWER)
        before = allocated()
        with (
            short_of_memory(TOO_LITTLE_FOR_A_TEXT) as failures,
            pytest.raises(ScoringError, match="not enough memory to run this model on a single text"),
        ):
            view.rolling_logprob(text)
        assert failures
        assert allocated() <= before + ROUNDING
        assert math.isfinite(view.rolling_logprob(text).total_logprob)


def test_batches_are_as_large_as_the_device_allows(cache: BackendCache, medium: Path) -> None:
    with cache.lease({"base": medium}) as backend, backend.as_base() as view:
        view.rolling_logprobs(TEXTS[:3])  # with all trials
        most, passes = engine_of(view).forward.limits.tokens, passes_of(view)
        view.rolling_logprobs(TEXTS)
        positions = [rows * width for rows, width in passes]
        assert max(positions) <= most
        assert (len(positions) == 1) == ON_CUDA
