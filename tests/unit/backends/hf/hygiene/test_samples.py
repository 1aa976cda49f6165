"""The sampled elements of a tensor are views of it, and lie in all of its rows and columns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pytest_sway.backends.hf.hygiene.contents import alike, sample_of

SHAPES = [
    (32, 32),
    (64, 32),
    (576, 1536),
    (4096, 4096),
    (11008, 4096),
    (49152, 576),
    (16, 4096),
    (4096, 16),
    (4096, 4),
    (8, 1024),
    (37 * 32, 64),
    (37 * 41, 64),
    (1024, 64, 1),
    (16, 64, 128),
    (128, 256, 64),
]


def _places(tensor: Any) -> Any:
    """The indices of a tensor's samples; each byte is one element."""
    sample = sample_of(tensor)
    at = torch.arange(len(sample)) * sample.stride(0)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    indices = torch.unravel_index(at, [tensor.shape[each] for each in order])
    return [indices[order.index(each)] for each in range(tensor.dim())]


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sixth_of_the_rows_and_of_the_columns_has_a_sample(shape: tuple[int, ...], transposed: bool) -> None:
    tensor = torch.empty(shape, dtype=torch.uint8)
    tensor = tensor.transpose(0, 1) if transposed else tensor
    for side, indices in zip(tensor.shape, _places(tensor), strict=True):
        assert {int(index) * 6 // side for index in indices} == {part * 6 // side for part in range(side)}


@pytest.mark.parametrize("shape", [*SHAPES, (), (1,), (5,), (37,), (1000,), (1, 1), (3, 5), (1, 40), (40, 1)], ids=str)
def test_a_few_samples_are_enough(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    assert min(numel, 32) <= len(sample_of(torch.empty(shape, dtype=torch.uint8))) <= min(numel, 80)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_an_empty_tensor_has_no_sample(shape: tuple[int, ...]) -> None:
    assert len(sample_of(torch.empty(shape))) == 0


def test_a_sample_shows_later_writes() -> None:
    tensor = torch.zeros(64, 64)
    sample = sample_of(tensor)
    tensor.data[:, 8:16] = 1
    assert sample.any()


def test_samples_of_one_device_and_dtype_are_one_group() -> None:
    samples = [
        sample_of(torch.empty(40, dtype=dtype, device=device))
        for device in ("cpu", "meta", "cpu", "meta")
        for dtype in (torch.float32, torch.uint8)
    ]
    groups = alike(samples)
    assert [len(group) for group in groups] == [2] * 4
    assert [{(each.device, each.dtype) for each in group} for group in groups] == [
        {(each.device, each.dtype)} for each in samples[:4]
    ]
    assert sum(len(torch.cat(group)) for group in groups) == sum(map(len, samples))
