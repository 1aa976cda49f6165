"""Every public call, as users write it; mypy checks it, and nothing runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, assert_type

import pytest

from pytest_sway import (
    BackendCache,
    CachedBackend,
    Chat,
    Classification,
    Comparison,
    DifferentialBackend,
    Lease,
    ModelSpec,
    RollingLogprob,
    SwayBackend,
    SwayCompare,
    SwayError,
    SwayWarning,
    TokenDist,
    View,
    cache_key_for,
    checkpoints,
)
from pytest_sway.errors import AdapterMismatchError, MutationError
from pytest_sway.protocols import (
    BatchView,
    Classifier,
    Embedder,
    NullCalibratedBackend,
    PreflightCheckable,
    Prompt,
    RawView,
    ScalableDifferentialBackend,
)
from pytest_sway.scores import divergences, exact_match, js_from, kl_from, multiple_choice

SPEC = ModelSpec(base="org/name", adapter=Path("runs/v3"), dtype="bf16")
ON_HUB = ModelSpec(adapter="org/lora", adapter_revision="v2", adapter_subfolder="checkpoint-8")
REWARD = ModelSpec(base="org/name", adapter=Path("runs/reward"), task="classification")
WHOLE = ModelSpec(base="org/name", finetuned="org/tuned")
CANNED = ModelSpec(kind="dummy", base="mine", answers={"base": {"generations": {"prompt": " text"}}})


def test_with_heads(sway_backend: SwayBackend) -> None:
    with sway_backend(REWARD).as_finetuned() as view:
        assert isinstance(view, Classifier)
        assert_type(
            view.classify(["a text", ("a", "pair"), [{"role": "user", "content": "Hello"}]]), list[Classification]
        )
        assert isinstance(view, Embedder)
        view.embed(["a text"], pooling="mean").shape  # noqa: B018


def test_with_the_fixture(sway_backend: SwayBackend) -> None:
    backend = sway_backend({"base": "org/name", "adapter": "runs/v3"})
    assert_type(backend, DifferentialBackend)
    sway_backend("v3")
    sway_backend(SPEC, adapter_path=Path("runs/v4"))
    sway_backend(SimpleNamespace(base="org/name"))
    sway_backend(base="org/name", adapter="runs/v3")
    sway_backend({"base": "org/name", "adapter": ["runs/sft", "runs/dpo"]})
    sway_backend(ModelSpec(base="org/name", adapter=(Path("runs/sft"), Path("runs/dpo"))))
    sway_backend()
    with backend.as_base() as base, backend.as_finetuned() as tuned:
        assert_type(base, View)
        assert_type(tuned.logprob_of("prompt", " completion"), float)
        assert_type(tuned.rolling_logprob("text"), RollingLogprob)
        assert_type(tuned.rolling_logprob("text").perplexity, float)
        assert_type(tuned.next_token_dist("prompt", top_k=8), TokenDist)
        assert_type(tuned.generate("prompt", max_new_tokens=8, temperature=0.5, top_p=0.9, seed=1), str)
        if isinstance(tuned, BatchView):
            messages = [{"role": "user", "content": "hello"}]
            prompt: Prompt = messages
            assert_type(tuned.render(messages), str)
            assert_type(tuned.logprobs_of([("prompt", " completion"), (prompt, " completion")]), list[float])
            assert_type(tuned.rolling_logprobs(["text"], prefix=False), list[RollingLogprob])
            assert_type(tuned.next_token_dists(["prompt", prompt], top_k=8), list[TokenDist])
            assert_type(tuned.generate_many(["prompt", prompt], max_new_tokens=8, seed=[1, 2]), list[str])
            chat = Chat(messages, tools=[], enable_thinking=False)
            assert_type(tuned.render(chat, continue_final_message=True), str)
            assert_type(tuned.generate(chat, stop="."), str)
            assert_type(tuned.generate_many([chat, "prompt"], stop=[".", "!"], top_k=9, min_p=0.1), list[str])
            tuned.generate("prompt", temperature=1.0, repetition_penalty=1.1)
            tuned.generate("prompt", num_beams=4)  # type: ignore[call-arg]
        if isinstance(tuned, RawView):
            tuned.model(tuned.tokenizer("text"))
    if isinstance(backend, ScalableDifferentialBackend):
        with backend.as_scaled_adapter(0.5) as scaled:
            scaled.logprob_of("prompt", " completion")
    if isinstance(backend, NullCalibratedBackend):
        with backend.as_null_adapter(7, init_scale=0.02, rank_scale=0.5) as null:
            null.close()
    if isinstance(backend, PreflightCheckable):
        ok, reason = backend.preflight_finite_check()
        assert ok, reason


def test_with_a_comparison(sway_backend: SwayBackend, sway_compare: SwayCompare) -> None:
    pairs = [("prompt", " completion"), ("another", " completion")]
    comparison = sway_compare(pairs, "candidate", SPEC, name="the town")
    assert_type(comparison, Comparison)
    assert_type((comparison.mean, comparison.low, comparison.high, comparison.n), tuple[float, float, float, int])
    assert_type((comparison.detectable, comparison.needed(0.1)), tuple[float, int])
    assert_type([row.difference for row in comparison.rows], list[float])
    assert_type(sway_compare(pairs, "candidate").drift, float | None)
    with sway_backend(SPEC).as_finetuned() as tuned:
        sway_compare(["a text", "another"], tuned, {"base": "org/name"})
        sway_compare([1, 2], tuned, "baseline", score=lambda view, questions: [len(view.id) for _ in questions])
        sway_compare(["a text", "another"], "candidate", "baseline", score=js_from(tuned))
        sway_compare(["a text", "another"], "candidate", "baseline", score=kl_from(tuned, top_k=20))
        sway_compare([("prompt", ["a", "b"], 0)], "candidate", "baseline", score=multiple_choice("acc_norm"))
        sway_compare(pairs, "candidate", "baseline", score=exact_match(max_new_tokens=8, until=["."]))
        (found,) = divergences(["prompt"], tuned, tuned, top_k=20)
        assert_type((found.kl, found.kl_tail, found.js, found.js_tail), tuple[float, float, float, float])


@pytest.fixture(scope="module")
def backend(sway_cache: BackendCache) -> Iterator[DifferentialBackend]:
    with sway_cache.lease(SPEC, holder="the module") as backend:
        yield backend


def test_with_the_cache() -> None:
    def build(spec: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        return spec, adapter_path

    cache = BackendCache(max_size=2, max_bytes=2**30, build=build, lease_timeout=1.0)
    cached = cache.get_or_load(SPEC, adapter_path=Path("runs/v4"))
    assert_type(cached, CachedBackend)
    assert_type(cached.load_seconds, float)
    lease = cache.acquire(SPEC)
    assert_type(lease, Lease)
    lease.release()
    assert cache_key_for(SPEC)[0] == "hf"
    assert_type(checkpoints("runs/town"), list[Path])
    assert_type(cache.loaded_specs(), list[ModelSpec])
    assert cache.loaded_keys() == [cached.key]
    assert cache.max_size == 2
    assert cache.stats.total().loads == 1
    cache.evict_all()
    assert_type(cache.shutdown(), list[str])


def test_with_errors(sway_backend: SwayBackend) -> None:
    with pytest.raises(AdapterMismatchError):
        sway_backend(SPEC)
    assert issubclass(MutationError, SwayError)
    assert issubclass(SwayWarning, UserWarning)
