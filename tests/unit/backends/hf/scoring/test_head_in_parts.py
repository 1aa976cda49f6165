"""The output layer of many positions: the logits of some words at a time, in the same memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_sway.backends.hf.scoring import body_and_head, output_layer
from pytest_sway.backends.hf.scoring import forward as forward_module
from pytest_sway.backends.hf.scoring.scores import _chosen_logprobs
from tests.unit.backends.hf.insides import engine_of

if TYPE_CHECKING:
    from pathlib import Path

LONG = " ".join(["the sun rises in the east and sets in the west"] * 12)
WORDS = 8
ROWS = 100


@pytest.fixture
def view(build: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The base of a small model whose output layer and logits count as large."""
    monkeypatch.setattr(output_layer, "_MANY_WEIGHTS", 1)
    monkeypatch.setattr(body_and_head, "_WORDS", WORDS)
    monkeypatch.setattr(forward_module, "_PART_BYTES", 4 * ROWS * 3 * WORDS)
    with build(base).as_base() as opened, torch.inference_mode():
        forward = engine_of(opened).forward
        forward.limits = replace(forward.limits, logits_bytes=1)
        yield opened


@pytest.fixture
def parts(view: Any) -> Any:
    return engine_of(view).forward.split()


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of words of each part, in order."""
    made: list[int] = []
    in_parts = body_and_head.BodyAndHead.logits_in_parts

    def noting(self: Any, rows: Any, nbytes: int) -> Iterator[Any]:
        for part in in_parts(self, rows, nbytes):
            made.append(part.shape[-1])
            yield part

    monkeypatch.setattr(body_and_head.BodyAndHead, "logits_in_parts", noting)
    return made


def _head(parts: Any) -> Any:
    return parts._model.get_output_embeddings()


def _states(parts: Any) -> Any:
    return torch.randn(ROWS, _head(parts).in_features, generator=torch.Generator().manual_seed(0))


def test_the_parts_are_those_of_the_whole_in_one_memory(parts: Any) -> None:
    states = _states(parts)
    found = [(part.clone(), part.data_ptr()) for part in parts.logits_in_parts(states, 4 * ROWS * 3 * WORDS)]
    assert [part.shape[-1] for part, _ in found[:-1]] == [3 * WORDS] * (len(found) - 1)
    assert len(found) > 2
    assert len({place for _, place in found}) == 1
    torch.testing.assert_close(torch.cat([part for part, _ in found], -1), parts.logits(states), rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(_head(parts))


def test_a_long_text_is_scored_in_parts_as_in_whole(view: Any, widths: list[int]) -> None:
    found = view.rolling_logprob(LONG, prefix=False)
    assert len(found.logprobs) > 64  # fewer rows are never divided
    assert max(widths) < engine_of(view).forward.embedded
    logits = view.model(torch.tensor([[*view.tokenizer(LONG)["input_ids"]]])).logits[0]
    every = torch.log_softmax(logits, -1)
    ids = view.tokenizer(LONG)["input_ids"]
    expected = [every[i - 1, ids[i]].item() for i in range(1, len(ids))]
    assert found.logprobs.tolist()[-len(expected) :] == pytest.approx(expected, abs=1e-4)


def _centred(logits: Any) -> Any:
    return logits - logits.mean(-1, keepdim=True)


def _without_a_word(logits: Any) -> Any:
    return logits.index_fill(-1, torch.tensor([3]), torch.finfo(logits.dtype).min)


def _without_the_last_word(logits: Any) -> Any:
    return logits.index_fill(-1, torch.tensor([logits.shape[-1] - 1]), torch.finfo(logits.dtype).min)


@pytest.mark.parametrize("change", [_centred, _without_a_word, _without_the_last_word])
def test_a_model_that_looks_at_all_words_is_not_divided(
    view: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    model = view.model
    plain = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = change(output.logits)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        patch.setattr(body_and_head, "compute_as_made", lambda *_: True)  # as if it were the model's own
        assert not engine_of(view).forward.split().divides_words


@pytest.mark.parametrize("where", ["model", "layer"])
def test_a_hook_gets_the_logits_of_all_words(view: Any, parts: Any, widths: list[int], where: str) -> None:
    assert parts.divides_words
    seen: set[int] = set()

    def hook(_: Any, __: Any, output: Any) -> None:
        seen.add((output if where == "layer" else output.logits).shape[-1])

    handle = (parts._model if where == "model" else _head(parts)).register_forward_hook(hook)
    try:
        view.rolling_logprob(LONG)
    finally:
        handle.remove()
    assert seen == {_head(parts).out_features}
    assert parts.divides_words


def test_a_replaced_forward_gets_the_logits_of_all_words(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parts.divides_words
    kind = type(parts._model)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", functools.wraps(kind.forward)(lambda *args, **kwargs: None))
        assert not parts.divides_words


def test_a_layer_with_a_bias_is_not_divided(parts: Any) -> None:
    assert parts.divides_words
    head = _head(parts)
    head.bias = torch.nn.Parameter(torch.ones(head.out_features), requires_grad=False)
    assert not parts.divides_words


def test_the_layer_is_itself_again_after_an_error(parts: Any) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        next(parts.logits_in_parts(torch.ones(ROWS, 3), 4 * ROWS * WORDS))
    assert "forward" not in vars(_head(parts))


@pytest.mark.parametrize("width", [1, 3, 7, 20])
def test_parts_are_normalised_together(width: int) -> None:
    logits: Any = 50 * torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    logits[1, :9] = float("-inf")
    rows, targets = [0, 1, 1, 4, 4], [3, 19, 2, 0, 0]
    expected = torch.log_softmax(logits.double(), -1)[rows, targets].tolist()
    found = _chosen_logprobs(logits.clone().split(width, -1), rows, targets)
    assert found == pytest.approx(expected, abs=1e-4)
