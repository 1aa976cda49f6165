"""Packing texts into one row without padding: which models allow it, and that texts do not affect each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sway.backends.hf.builder import HFBuilder
from pytest_sway.backends.hf.scoring.batching import PrefixGroup, alone, families
from pytest_sway.backends.hf.scoring.packing import MaskedError, PackedBatch, attending_apart, longest_packed
from tests.tiny import WORDS
from tests.unit.backends.hf.conftest import spec_of
from tests.unit.backends.hf.insides import WAIT, computing_model, engine_of, held_up, passes_of
from tests.unit.backends.hf.reference import fresh, logits

if TYPE_CHECKING:
    from pathlib import Path

SEQUENCES = [[5, 6, 7], [1] * 90, [9], [3, 3, 3], list(range(40)), [2, 4]]


def _mask_more(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a model that allows packing a mask of its own."""
    assert engine_of(view).forward.packs(1)

    def masked(*args: Any, **kwargs: Any) -> Any:
        raise MaskedError("masked")

    monkeypatch.setattr(PackedBatch, "attention", masked)


def _flat(runs: list[range]) -> list[int]:
    return [place for run in runs for place in run]


def _require_attention_of_each_alone(sequences: list[list[int]], families: list[PrefixGroup] | None = None) -> None:
    import torch
    from transformers.integrations import sdpa_attention

    attend: Any = sdpa_attention.sdpa_attention_forward
    row = PackedBatch(sequences, "cpu", families)
    count = row.input_ids.shape[1]
    generator, module = torch.Generator().manual_seed(0), torch.nn.Module()
    tensors = [torch.randn(1, 4, count, 8, generator=generator) for _ in range(3)]
    found = row.attention(attend, module, tensors, scaling=0.3)
    assert found.shape == (1, count, 4, 8)
    for places in map(_flat, row.places):
        expected = attend(module, *(tensor[:, :, places] for tensor in tensors), None, scaling=0.3)[0]
        torch.testing.assert_close(found[:, places], expected, atol=1e-6, rtol=1e-6)


def test_a_row_holds_each_sequence_with_its_own_positions() -> None:
    row = PackedBatch(SEQUENCES, "cpu")
    tokens, positions = row.input_ids[0].tolist(), row.position_ids[0].tolist()
    assert len(tokens) == sum(map(len, SEQUENCES))
    for places, ids in zip(map(_flat, row.places), SEQUENCES, strict=True):
        assert [tokens[place] for place in places] == ids
        assert [positions[place] for place in places] == list(range(len(ids)))


@pytest.mark.parametrize("sequences", [SEQUENCES, [[1, 2]] * 5, [[1]], [[1] * n for n in (300, 2, 299, 1)]])
def test_attention_in_a_row_is_that_of_each_sequence_alone(sequences: list[list[int]]) -> None:
    _require_attention_of_each_alone(sequences)


STEM = [5, 6, 7, 8]
ALIKE = [[*STEM, 1, 2, 3], STEM, [*STEM, 3], [*STEM, 1], [*STEM, 1, 5], [*STEM, 1, 2, 4, 4], [6, 1], [6, 2, 2], [6, 2]]
FAMILIES = [PrefixGroup([7, 9, 6, 11, 10, 8], 4, 4 + 7), *alone(SEQUENCES), PrefixGroup([12, 14, 13], 1, 1 + 3)]


def test_a_common_prefix_of_a_group_is_stored_once() -> None:
    sequences = SEQUENCES + ALIKE
    row = PackedBatch(sequences, "cpu", FAMILIES)
    tokens, positions = row.input_ids[0].tolist(), row.position_ids[0].tolist()
    assert len(tokens) == sum(map(len, SEQUENCES)) + 4 + 7 + 1 + 3
    for places, ids in zip(map(_flat, row.places), sequences, strict=True):
        assert [tokens[place] for place in places] == ids
        assert [positions[place] for place in places] == list(range(len(ids)))


def test_attention_in_a_family_is_that_of_each_sequence_alone() -> None:
    _require_attention_of_each_alone(SEQUENCES + ALIKE, FAMILIES)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=2, max_size=8))
@settings(deadline=None, max_examples=30)
def test_attention_in_any_family_is_that_of_each_sequence_alone(tails: list[list[int]]) -> None:
    sequences = [STEM * 5 + tail for tail in tails]
    found = families(sequences, tokens=100, overhead=0)
    assert len(found) == 1
    _require_attention_of_each_alone(sequences, found)


def test_a_model_goes_back_to_its_own_attention_whatever_happens(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        config = computing_model(view).config
        before = dict(vars(config))
        view.rolling_logprobs(["the sun rises", "a fox"])
        with pytest.raises(RuntimeError, match="in between"), attending_apart(config, PackedBatch([[1]], "cpu")):
            raise RuntimeError("in between")
        assert vars(config) == before


def test_a_tests_own_model_is_right_while_a_view_scores_a_row_in_another_thread(build: Any, base: Path) -> None:
    texts = ["the sun rises in the east", "a fox"]
    expected = logits(*fresh(base))
    with build(base).as_base() as view, ThreadPoolExecutor(1) as pool:
        model, tokenizer = view.model, view.tokenizer
        assert engine_of(view).forward.packs(1)
        with held_up(view) as begun:
            scored = pool.submit(view.rolling_logprobs, texts)
            assert begun.wait(WAIT)
            assert logits(model, tokenizer).equal(expected)
            assert not scored.done()
        together = scored.result(WAIT)
        for text, rolling in zip(texts, together, strict=True):
            assert rolling.logprobs == pytest.approx(view.rolling_logprob(text).logprobs, abs=2e-4)


def test_a_text_beyond_a_models_window_is_padded(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        forward = engine_of(view).forward
        forward.config.sliding_window = 6
        assert longest_packed(forward.config) == 6
        assert forward.packs(6)
        assert not forward.packs(7)


def test_a_text_beyond_a_models_window_leaves_the_others_in_a_row(base: Path) -> None:
    prompt = " ".join(["the sun rises"] * 20)
    pairs = [(prompt, completion) for completion in (" in the east", " and", " a fox sees")]
    pairs.append((f"{prompt} {prompt}", " and"))
    backend = HFBuilder(score_cache=0)(spec_of(base))
    with backend.as_base() as view:
        computing_model(view).config.sliding_window = 70
        shapes = passes_of(view)
        found = view.logprobs_of(pairs)
    together = sum(rows * width for rows, width in shapes if width >= 60)
    with backend.as_base() as view:
        assert found == pytest.approx([view.logprob_of(*pair) for pair in pairs], abs=2e-4)
    backend.close()
    assert 120 < together < 4 * 60


def test_attention_that_cannot_be_taken_over_stays_as_it_is(build: Any, base: Path) -> None:
    with build(base).as_base() as view:
        engine = engine_of(view)
        engine.forward.model.set_attn_implementation("eager")
        assert not engine.forward.packs(1)


def test_completions_share_a_key_value_cache_where_attention_cannot_be_taken_over(build: Any, base: Path) -> None:
    pairs = [(" ".join(["the sun rises"] * 20), completion) for completion in (" in the east", " and", " a fox sees")]
    with build(base).as_base() as view:
        expected = view.logprobs_of(pairs)
        assert len(set(expected)) == 3
    backend = build(base, allow_pickle=True)  # another spec, so that it is loaded anew
    with backend.as_base() as view:
        computing_model(view).set_attn_implementation("eager")
        shapes = passes_of(view)
        assert view.logprobs_of(pairs) == pytest.approx(expected, abs=2e-4)
        assert sum(width >= 60 for _, width in shapes) == 1, "the prompt was read once"


def test_very_many_completions_share_a_key_value_cache_in_parts(build: Any, base: Path) -> None:
    prompt = " ".join(["the sun rises"] * 20)
    pairs = [(prompt, f" {word} and") for word in WORDS[:12]]
    with build(base).as_base() as view:
        forward = engine_of(view).forward
        forward.model.set_attn_implementation("eager")
        alone = [view.logprob_of(*pair) for pair in pairs]
        forward.limits = replace(forward.limits, cached_tokens=8)
        shapes = passes_of(view)
        assert view.logprobs_of(pairs) == pytest.approx(alone, abs=2e-4)
    assert sum(width >= 60 for _, width in shapes) == 3, "four completions of two tokens each at once"


def test_a_model_that_turns_out_to_mask_more_is_given_completions_by_their_cache_from_then_on(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    prompts = [" ".join([text] * 20) for text in ("the sun rises", "a fox sees it")]
    pairs = [(prompt, completion) for prompt in prompts for completion in (" in the east", " and", " a fox sees")]
    with build(base).as_base() as view:
        expected = view.logprobs_of(pairs)
    backend = build(base, allow_pickle=True)  # another spec, so that it is loaded anew
    with backend.as_base() as view:
        _mask_more(view, monkeypatch)
        widths: list[int] = []
        embed = torch.nn.functional.embedding

        def counted(ids: Any, *args: Any) -> Any:
            widths.append(ids.shape[1])
            return embed(ids, *args)

        # Of all models, since an error discards a model. A patch of a class would be tried by itself.
        monkeypatch.setattr(torch.nn.functional, "embedding", counted)
        assert view.logprobs_of(pairs) == pytest.approx(expected, abs=2e-4)
        assert widths[0] > 2 * 60, "a row of both prompts, which is refused"
        assert sum(width >= 60 for width in widths[1:]) == 2, "then each prompt was read once"
        assert not engine_of(view).forward.packs(1)


def test_a_model_that_turns_out_to_mask_more_is_given_its_texts_padded_from_then_on(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the sun rises in the east", "a fox"]
    with build(base).as_base() as view:
        expected = view.rolling_logprobs(texts)
    backend = build(base, allow_pickle=True)  # another spec, so that it is loaded anew
    with backend.as_base() as view:
        _mask_more(view, monkeypatch)
        found = view.rolling_logprobs(texts)
        assert not engine_of(view).forward.packs(1)
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)


@pytest.mark.parametrize(
    "attend",
    [
        lambda self, attend, module, tensors, **kwargs: attend(module, *tensors, None, **kwargs)[0],
        lambda *args, **kwargs: 1 / 0,
    ],
    ids=["mixes its texts", "fails"],
)
def test_a_model_that_does_not_keep_texts_apart_is_given_them_padded(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch, attend: Any
) -> None:
    with build(base).as_base() as view:
        expected = view.rolling_logprobs(["the sun rises in the east", "a fox"])
    monkeypatch.setattr(PackedBatch, "attention", attend)
    backend = build(base, allow_pickle=True)  # another spec, so that it is loaded anew
    with backend.as_base() as view:
        found = view.rolling_logprobs(["the sun rises in the east", "a fox"])
        assert not engine_of(view).forward.packs(1)
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)
