"""Texts of any lengths in one row without padding: which models do it, and that each text stays by itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sway.backends.hf.packing import MaskedError, Row, attending_apart, longest_packed
from pytest_sway.errors import BackendUseError

if TYPE_CHECKING:
    from pathlib import Path

SEQUENCES = [[5, 6, 7], [1] * 90, [9], [3, 3, 3], list(range(40)), [2, 4]]


def _forward(backend: Any) -> Any:
    return backend._loaded.base.base.forward


def _mask_more(backend: Any, view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a model that packs turn out to have a mask of its own."""
    assert _forward(backend).packs(view.model, 1)

    def masked(*args: Any, **kwargs: Any) -> Any:
        raise MaskedError("masked")

    monkeypatch.setattr(Row, "attention", masked)


def test_a_row_holds_each_sequence_with_its_own_positions() -> None:
    row = Row(SEQUENCES, "cpu")
    tokens, positions = row.input_ids[0].tolist(), row.position_ids[0].tolist()
    assert len(tokens) == sum(map(len, SEQUENCES))
    for start, ids in zip(row.starts, SEQUENCES, strict=True):
        assert tokens[start : start + len(ids)] == ids
        assert positions[start : start + len(ids)] == list(range(len(ids)))


@pytest.mark.parametrize("sequences", [SEQUENCES, [[1, 2]] * 5, [[1]], [[1] * n for n in (300, 2, 299, 1)]])
def test_attention_in_a_row_is_that_of_each_sequence_alone(sequences: list[list[int]]) -> None:
    import torch
    from transformers.integrations import sdpa_attention

    attend: Any = sdpa_attention.sdpa_attention_forward
    row, count = Row(sequences, "cpu"), sum(map(len, sequences))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 4, count, 8, generator=generator) for _ in range(3)]
    module = torch.nn.Module()
    found = row.attention(attend, module, tensors, scaling=0.3)
    assert found.shape == (1, count, 4, 8)
    for start, ids in zip(row.starts, sequences, strict=True):
        mine = [tensor[:, :, start : start + len(ids)] for tensor in tensors]
        expected = attend(module, *mine, None, scaling=0.3)[0]
        torch.testing.assert_close(found[:, start : start + len(ids)], expected, atol=1e-6, rtol=1e-6)


CONTINUATIONS: dict[int, list[list[int]]] = {0: [[7, 8], [], [9]], 4: [[1, 2, 3]], 2: [[], []]}


def test_continuations_stand_behind_all_sequences_with_the_positions_that_follow_theirs() -> None:
    row = Row(SEQUENCES, "cpu", CONTINUATIONS)
    tokens, positions = row.input_ids[0].tolist(), row.position_ids[0].tolist()
    assert len(tokens) == sum(map(len, SEQUENCES)) + 6
    assert row.continued.keys() == CONTINUATIONS.keys()
    for i, starts in row.continued.items():
        for start, ids in zip(starts, CONTINUATIONS[i], strict=True):
            assert start >= sum(map(len, SEQUENCES))
            assert tokens[start : start + len(ids)] == ids
            first = len(SEQUENCES[i])
            assert positions[start : start + len(ids)] == list(range(first, first + len(ids)))


def test_attention_of_a_continuation_is_that_after_its_own_sequence_alone() -> None:
    import torch
    from transformers.integrations import sdpa_attention

    attend: Any = sdpa_attention.sdpa_attention_forward
    row = Row(SEQUENCES, "cpu", CONTINUATIONS)
    generator, module = torch.Generator().manual_seed(0), torch.nn.Module()
    tensors = [torch.randn(1, 4, row.input_ids.shape[1], 8, generator=generator) for _ in range(3)]
    found = row.attention(attend, module, tensors, scaling=0.3)
    assert found.shape == (1, row.input_ids.shape[1], 4, 8)
    for i, starts in row.continued.items():
        stem = slice(row.starts[i], row.starts[i] + len(SEQUENCES[i]))
        for start, ids in zip(starts, CONTINUATIONS[i], strict=True):
            own = slice(start, start + len(ids))
            mine = [torch.cat([tensor[:, :, stem], tensor[:, :, own]], dim=2) for tensor in tensors]
            expected = attend(module, *mine, None, scaling=0.3)[0][:, len(SEQUENCES[i]) :]
            torch.testing.assert_close(found[:, own], expected, atol=1e-6, rtol=1e-6)


def test_a_model_goes_back_to_its_own_attention_whatever_happens(build: Any, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view:
        config = view.model.config
        before = dict(vars(config))
        view.rolling_logprobs(["the sun rises", "a fox"])
        with pytest.raises(RuntimeError, match="in between"), attending_apart(config, Row([[1]], "cpu")):
            raise RuntimeError("in between")
        assert vars(config) == before
        assert backend.changes() == []


def test_the_raw_model_is_not_called_while_a_view_scores_in_another_thread(build: Any, base: Path) -> None:
    import torch

    with build(base).as_base() as view, ThreadPoolExecutor(1) as pool:
        model = view.model
        ids = torch.tensor([[1, 2, 3]])
        with attending_apart(model.config, Row([[1]], "cpu")):
            called = pool.submit(lambda: model(input_ids=ids))
            with pytest.raises(BackendUseError, match="Let them take turns"):
                called.result()
        assert model(input_ids=ids).logits.shape[1] == 3


def test_a_text_beyond_a_models_window_is_padded(build: Any, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view:
        view.model.config.sliding_window = 6
        assert longest_packed(view.model.config) == 6
        forward = _forward(backend)
        assert forward.packs(view.model, 6)
        assert not forward.packs(view.model, 7)
        del view.model.config.sliding_window


def test_attention_that_cannot_be_taken_over_stays_as_it_is(build: Any, base: Path) -> None:
    backend = build(base)
    with backend.as_base() as view:
        view.model.set_attn_implementation("eager")
        assert not _forward(backend).packs(view.model, 1)
        view.model.set_attn_implementation("sdpa")


def test_completions_share_a_key_value_cache_where_attention_cannot_be_taken_over(build: Any, base: Path) -> None:
    pairs = [(" ".join(["the sun rises"] * 20), completion) for completion in (" in the east", " and", " a fox sees")]
    with build(base).as_base() as view:
        expected = view.logprobs_of(pairs)
        assert len(set(expected)) == 3
    backend = build(base, allow_pickle=True)  # another spec, so that it is loaded anew
    with backend.as_base() as view:
        view.model.set_attn_implementation("eager")
        widths: list[int] = []
        view.model.model.embed_tokens.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
        assert view.logprobs_of(pairs) == pytest.approx(expected, abs=2e-4)
        assert sum(width >= 60 for width in widths) == 1, "the prompt was read once"


def test_a_model_that_turns_out_to_mask_more_is_given_completions_by_their_cache_from_then_on(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [" ".join([text] * 20) for text in ("the sun rises", "a fox sees it")]
    pairs = [(prompt, completion) for prompt in prompts for completion in (" in the east", " and", " a fox sees")]
    with build(base).as_base() as view:
        expected = view.logprobs_of(pairs)
    backend = build(base, allow_pickle=True)  # another spec, so that it is loaded anew
    with backend.as_base() as view:
        _mask_more(backend, view, monkeypatch)
        assert view.logprobs_of(pairs) == pytest.approx(expected, abs=2e-4)
        assert not _forward(backend).packs(view.model, 1)
        assert view.logprobs_of(pairs) == pytest.approx(expected, abs=2e-4)


def test_a_model_that_turns_out_to_mask_more_is_given_its_texts_padded_from_then_on(
    build: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the sun rises in the east", "a fox"]
    with build(base).as_base() as view:
        expected = view.rolling_logprobs(texts)
    backend = build(base, allow_pickle=True)  # another spec, so that it is loaded anew
    with backend.as_base() as view:
        _mask_more(backend, view, monkeypatch)
        found = view.rolling_logprobs(texts)
        assert not _forward(backend).packs(view.model, 1)
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
    monkeypatch.setattr(Row, "attention", attend)
    backend = build(base, allow_pickle=True)  # another spec, so that it is loaded anew
    with backend.as_base() as view:
        found = view.rolling_logprobs(["the sun rises in the east", "a fox"])
        assert not _forward(backend).packs(view.model, 1)
    for a, b in zip(found, expected, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)
