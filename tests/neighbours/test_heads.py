"""Sequence-to-sequence models score and write as in lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from tests.neighbours import harness
from tests.unit.backends.hf.heads.models import TEXTS, make_head_adapter, make_model

AUTO = "AutoModelForSeq2SeqLM"
TARGETS = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module", params=["t5", "bart"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root: Path = tmp_path_factory.mktemp(request.param)
    folder = make_model(root / "base", request.param, AUTO, ends=True)
    adapter = make_head_adapter(root / "adapter", folder, AUTO, "SEQ_2_SEQ_LM", targets=TARGETS[request.param])
    cache = BackendCache(max_size=1)
    with cache.lease({"base": folder, "adapter": adapter}) as backend:
        yield backend
    cache.shutdown()


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
def test_logprobs_of_pairs_agree(backend: Any, side: str) -> None:
    pairs = [(text, f" {other}") for text in TEXTS for other in TEXTS]
    pairs += [("the sun rises ", "in the east"), ("", "hello world"), ("sun " * 600, " the sea")]
    with getattr(backend, side)() as view:
        lm = harness.hflm(view.model, view.tokenizer, backend="seq2seq")
        expected = harness.of_pairs(lm, pairs)
        if view.model.config.model_type == "bart":  # which reads 128 tokens; T5 reads as many as its tokenizer says
            assert lm.max_length == 128
        with pytest.warns(match="1 of the prompts are too long"):
            found = view.logprobs_of(pairs)
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("side", ["as_base", "as_finetuned"])
def test_greedy_texts_agree(backend: Any, side: str) -> None:
    """One by one: the harness pads prompts on the left, which moves BART's positions; and it writes longer texts."""
    with getattr(backend, side)() as view:
        theirs = harness.written(harness.hflm(view.model, view.tokenizer, 1, backend="seq2seq"), TEXTS, 6)
        ours = view.generate_many(TEXTS, max_new_tokens=6)
    assert any(ours)
    assert [text[: len(own)] for text, own in zip(theirs, ours, strict=True)] == ours
