"""The output layer of few rows: the same numbers, by a product that MKL computes sooner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_sway.backends.hf.scoring import body_and_head
from tests.unit.backends.hf.insides import engine_of

if TYPE_CHECKING:
    from pathlib import Path

mkl: Any = torch.backends.mkl
needs_mkl = pytest.mark.skipif(not mkl.is_available(), reason="the product is for MKL")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product with exchanged factors, in order."""
    made: list[int] = []
    times = body_and_head._times

    def counted(states: Any, weight: Any) -> Any:
        made.append(states.shape[-2])
        return times(states, weight)

    monkeypatch.setattr(body_and_head, "_times", counted)
    return made


def _states(rows: int) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))


def _parts(view: Any) -> Any:
    parts = engine_of(view).forward.split()
    assert parts is not None
    return parts


@needs_mkl
def test_the_logits_are_those_of_the_layer(build: Any, base: Path, products: list[int]) -> None:
    with build(base).as_base() as view, threads(2), torch.inference_mode():
        parts = _parts(view)
        head = parts._model.get_output_embeddings()
        products.clear()
        for rows in (1, 2, 7, 16, 17):
            states = _states(rows)[:, : head.in_features]
            found = parts.logits(states)
            assert found.is_contiguous()
            torch.testing.assert_close(found, states @ head.weight.T, rtol=1e-5, atol=1e-5)
        assert products == [2, 7, 16]
        assert "forward" not in vars(head)


@needs_mkl
def test_one_thread_uses_it_for_fewer_rows(build: Any, base: Path, products: list[int]) -> None:
    with build(base).as_base() as view, threads(1), torch.inference_mode():
        parts = _parts(view)
        products.clear()
        for rows in (8, 9):
            parts.logits(_states(rows)[:, : parts._model.get_output_embeddings().in_features])
        assert products == [8]


def test_other_layers_compute_as_they_do(build: Any, base: Path, products: list[int]) -> None:
    with build(base, dtype="bf16").as_base() as view, torch.inference_mode():
        parts = _parts(view)
        head = parts._model.get_output_embeddings()
        parts.logits(_states(4)[:, : head.in_features].bfloat16())
    with build(base).as_base() as view, torch.inference_mode():
        parts = _parts(view)
        head = parts._model.get_output_embeddings()
        products.clear()
        states = _states(4)[:, : head.in_features]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert parts.logits(states).dtype == torch.bfloat16
        head.bias = torch.nn.Parameter(torch.ones(head.out_features), requires_grad=False)
        torch.testing.assert_close(parts.logits(states), states @ head.weight.T + 1)
    assert products == []


def test_a_layer_that_somebody_replaced_is_used(
    build: Any, base: Path, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with build(base).as_base() as view, torch.inference_mode():
        parts = _parts(view)
        head = parts._model.get_output_embeddings()
        products.clear()
        states = _states(4)[:, : head.in_features]
        zeros = torch.zeros(1, 4, head.out_features)
        with monkeypatch.context() as patch:
            patch.setattr(head, "forward", lambda states: zeros)
            assert parts.logits(states).eq(0).all()
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Linear, "forward", lambda self, states: zeros)
            assert parts.logits(states).eq(0).all()
    assert products == []


@needs_mkl
def test_the_layer_is_itself_again_after_an_error(build: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError

    with build(base).as_base() as view, torch.inference_mode():
        parts = _parts(view)
        head = parts._model.get_output_embeddings()
        monkeypatch.setattr(body_and_head, "_times", fails)
        with pytest.raises(MemoryError):
            parts.logits(_states(4)[:, : head.in_features])
        assert "forward" not in vars(head)
