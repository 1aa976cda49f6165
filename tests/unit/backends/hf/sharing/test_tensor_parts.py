"""Wrapper tensors such as torchao's weights, which hold other tensors and refuse most operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytest_sway.backends.hf.hygiene.contents import ContentsRecord
from pytest_sway.backends.hf.hygiene.memory import WeightsWatch, measured
from pytest_sway.backends.hf.sharing.shared_memory import SharedMemory
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of


class Quantized(torch.Tensor):
    """Eight-bit columns and a scale, wrapped as one float32 tensor that supports only copying."""

    def __new__(cls, numbers: Any, scale: Any) -> Any:
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers: Any, scale: Any) -> None:
        self.numbers = numbers
        self.scale = scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return cls(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.clone):
            return cls(func(args[0].numbers), func(args[0].scale))
        raise NotImplementedError(f"{func} of {cls.__name__}")


@pytest.fixture
def model() -> Any:
    layer = torch.nn.Linear(8, 8, bias=False)
    numbers = torch.arange(64, dtype=torch.int8).view(8, 8).t()
    layer.weight = torch.nn.Parameter(Quantized(numbers, torch.ones(8)), requires_grad=False)
    return layer


def test_its_bytes_are_those_inside(model: Any) -> None:
    assert measured(model.parameters()) == 64 + 8 * 4


def test_a_tree_has_a_wrapper_of_its_own_around_the_same_memory(model: Any) -> None:
    memory = SharedMemory(model)
    assert list(memory.exposed) == ["weight"]
    tree = memory.tree()
    assert type(tree.weight.data) is Quantized
    assert tree.weight is not model.weight
    assert tree.weight.numbers.data_ptr() == model.weight.numbers.data_ptr()


@pytest.mark.parametrize("written", ["", "numbers", "scale"])
def test_what_an_adapter_has_not_written_is_shared_again(model: Any, written: str) -> None:
    memory, known = SharedMemory(model), dict[int, Any]()
    tree = memory.tree(known, isolated=True)
    assert tree.weight.numbers.data_ptr() != model.weight.numbers.data_ptr()
    if written:
        getattr(tree.weight, written)[3:] = 7
    settled = memory.settle(tree, known)
    assert bool(settled) is not bool(written)
    shared = tree.weight.numbers.data_ptr() == model.weight.numbers.data_ptr()
    assert shared is not bool(written)


@pytest.mark.parametrize("name", ["numbers", "scale"])
def test_a_write_to_what_is_inside_is_seen_by_name(model: Any, name: str) -> None:
    record = ContentsRecord({"weight": model.weight})
    assert record.changes() == []
    getattr(model.weight, name).data[:] = 5
    assert record.changes() == [f"weight.{name}: contents changed"]


def test_what_is_inside_is_watched_after_a_close(model: Any) -> None:
    watch, kept = WeightsWatch([model.weight]), model.weight.numbers
    del model.weight
    assert watch.alive_bytes() == kept.nbytes


def test_wrappers_in_wrappers_are_opened(model: Any) -> None:
    outer = Quantized(Quantized(torch.ones(2), torch.ones(1)), torch.ones(1))
    assert [name for name, _ in parts_of(outer, "w")] == ["w.numbers.numbers", "w.numbers.scale", "w.scale"]
