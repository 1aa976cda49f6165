"""The output layer of texts that grow: the same numbers, by a product that MKL computes sooner."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_sway.backends.hf.scoring import output_layer
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
def parts(build: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A small model in two parts, whose output layer counts as large."""
    monkeypatch.setattr(output_layer, "_MANY_WEIGHTS", 1)
    with build(base).as_base() as view, torch.inference_mode():
        yield engine_of(view).forward.split()


def _head(parts: Any) -> Any:
    return parts._model.get_output_embeddings()


def _states(parts: Any, rows: int) -> Any:
    return torch.randn(rows, _head(parts).in_features, generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product with exchanged factors, in order."""
    made: list[int] = []
    exchanged = output_layer._exchanged

    def noting(states: Any, weight: Any) -> Any:
        made.append(states.shape[-2])
        return exchanged(states, weight)

    monkeypatch.setattr(output_layer, "_exchanged", noting)
    return made


@needs_mkl
@pytest.mark.parametrize(("count", "expected"), [(2, [2, 5, 6, 16]), (1, [2, 5])])
def test_the_logits_are_those_of_the_layer(parts: Any, products: list[int], count: int, expected: list[int]) -> None:
    with threads(count):
        for rows in (1, 2, 5, 6, 16, 17):
            states = _states(parts, rows)
            found = parts.logits(states, quick=True)
            assert found.is_contiguous()
            torch.testing.assert_close(found, states @ _head(parts).weight.T, rtol=1e-5, atol=1e-5)
    assert products == expected
    assert "forward" not in vars(_head(parts))


def test_scores_are_computed_by_the_layer_itself(parts: Any, products: list[int]) -> None:
    parts.logits(_states(parts, 4))
    assert products == []


def test_other_layers_compute_as_they_do(parts: Any) -> None:
    head, states = _head(parts), _states(parts, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert parts.logits(states, quick=True).dtype == torch.bfloat16
    head.bias = torch.nn.Parameter(torch.ones(head.out_features), requires_grad=False)
    torch.testing.assert_close(parts.logits(states, quick=True), states @ head.weight.T + 1)


def _on_the_layer(patch: pytest.MonkeyPatch, parts: Any, zeros: Callable[..., Any]) -> None:
    patch.setattr(_head(parts), "forward", zeros)


def _on_the_class(patch: pytest.MonkeyPatch, parts: Any, zeros: Callable[..., Any]) -> None:
    patch.setattr(torch.nn.Linear, "forward", functools.wraps(torch.nn.Linear.forward)(lambda _, states: zeros(states)))


def _on_the_function(patch: pytest.MonkeyPatch, parts: Any, zeros: Callable[..., Any]) -> None:
    patch.setattr(torch.nn.functional, "linear", lambda states, *_: zeros(states))


@pytest.mark.parametrize("replace", [_on_the_layer, _on_the_class, _on_the_function])
def test_a_layer_that_somebody_replaced_is_used(
    parts: Any, monkeypatch: pytest.MonkeyPatch, replace: Callable[..., None]
) -> None:
    def zeros(states: Any) -> Any:
        return torch.zeros(*states.shape[:-1], _head(parts).out_features)

    states = _states(parts, 4)
    with monkeypatch.context() as patch:
        replace(patch, parts, zeros)
        assert parts.logits(states, quick=True).eq(0).all()


def test_who_looks_at_each_operation_sees_the_layer(parts: Any) -> None:
    from torch.overrides import TorchFunctionMode

    seen: list[str] = []

    class Looks(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    states = _states(parts, 4)
    with Looks():
        parts.logits(states, quick=True)
    assert "linear" in seen
    assert "mm" not in seen


def test_a_model_that_names_no_output_layer_computes_as_it_does(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise NotImplementedError

    states = _states(parts, 4)
    expected = parts.logits(states)
    monkeypatch.setattr(parts._model, "get_output_embeddings", fails)
    assert torch.equal(parts.logits(states, quick=True), expected)


@needs_mkl
def test_the_layer_is_itself_again_after_an_error(parts: Any) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        parts.logits(torch.ones(4, 3), quick=True)
    assert "forward" not in vars(_head(parts))
