"""Computes a model's output layer in another way, while the model's own ``forward`` runs around it."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.hygiene.contents import has_own_forward, home_of, is_observed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__tracebackhide__ = True

_FEW_ROWS: Final = 16
_FEW_ROWS_FOR_ONE_THREAD: Final = 5
_MANY_WEIGHTS: Final = 2**20
"""Where `quick_for_few_rows` was faster on an AMD EPYC with AVX-512, for 32,000 to 262,144 tokens."""


def plain_layer(model: Any) -> Any:
    """Return a model's output layer; ``None`` if it does more than multiply by many float32 weights on a CPU."""
    layer: Any = None
    if model.device.type == "cpu":
        with suppress(Exception):  # an unknown architecture may raise anything
            layer = model.get_output_embeddings()
    return layer if _is_plain(layer) else None


def _is_plain(layer: Any) -> bool:
    """Return whether a layer only multiplies float32 states by many float32 weights, by torch's own code."""
    import torch

    if type(layer) is not torch.nn.Linear or layer.bias is not None or "forward" in vars(layer):
        return False
    weight, torchs = layer.weight, torch.nn.functional.linear is torch._C._nn.linear
    if not torchs or home_of(torch.nn.Linear.forward) != torch.nn.Linear.__module__ or is_observed():
        return False  # somebody has replaced it, or looks at each operation
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.dtype == torch.float32
    return plain and weight.numel() >= _MANY_WEIGHTS and not torch.is_autocast_enabled("cpu")


def compute_as_made(*modules: Any) -> bool:
    """Return whether modules have no hooks and the ``forward`` of their classes; others may expect all words."""
    return all(
        "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and has_own_forward(type(module))
        for module in modules
    )


@contextmanager
def quick_for_few_rows(model: Any) -> Iterator[None]:
    """Multiply few rows by the weights of the output layer as MKL reads them in place, if the layer is plain.

    ``torch.nn.Linear`` has MKL copy the weights first. With the factors exchanged it does not: on two cores, 16 rows
    take 0.75 of the time, and 2 to 8 rows half of it. The numbers are equal but for rounding.
    """
    import torch

    mkl: Any = torch.backends.mkl
    layer = plain_layer(model) if mkl.is_available() else None
    if layer is None:
        yield
        return
    most = _FEW_ROWS if torch.get_num_threads() > 1 else _FEW_ROWS_FOR_ONE_THREAD

    def forward(input: Any) -> Any:  # noqa: A002 # as torch names it
        is_quick = 1 < input.numel() // layer.in_features <= most
        return (_exchanged if is_quick else torch.nn.functional.linear)(input, layer.weight)

    with _computing(layer, forward):
        yield


@contextmanager
def only_words(layer: Any, start: int, end: int, memory: Any) -> Iterator[None]:
    """Compute the logits of the words from one number up to another, in some memory.

    Args:
        layer: What `plain_layer` returned.
        start: The first word.
        end: The word after the last one; may exceed the vocabulary.
        memory: Room for the logits, as a tensor of one dimension.
    """
    import torch

    weight = layer.weight[start:end]

    def forward(input: Any) -> Any:  # noqa: A002 # as torch names it
        states = input.flatten(0, -2)
        logits = memory[: len(states) * len(weight)].view(len(states), len(weight))
        return torch.mm(states, weight.t(), out=logits).view(*input.shape[:-1], len(weight))

    with _computing(layer, forward):
        yield


@contextmanager
def _computing(layer: Any, forward: Callable[..., Any]) -> Iterator[None]:
    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]


def _exchanged(states: Any, weight: Any) -> Any:
    """Return ``states @ weight.T``, computed as ``weight @ states.T``."""
    return weight.mm(states.flatten(0, -2).t()).t().contiguous().view(*states.shape[:-1], len(weight))
