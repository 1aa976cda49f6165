from __future__ import annotations

from typing import Any

import pytest

from pytest_sway.backends.hf.scoring.batching import in_halves
from pytest_sway.errors import ScoringError


def _run(work: Any, batch: list[int], *args: Any) -> Any:
    return work(batch, *args)


def _errors() -> list[BaseException]:
    import torch

    return [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ]


@pytest.mark.parametrize("error", _errors(), ids=lambda error: type(error).__name__)
def test_a_batch_that_runs_out_of_memory_is_tried_again_in_halves(error: BaseException) -> None:
    tried: list[int] = []

    def work(batch: list[int], add: int) -> list[int]:
        tried.append(len(batch))
        if len(batch) > 2:
            raise error
        return [item + add for item in batch]

    assert in_halves(_run, work, [1, 2, 3, 4, 5], 10) == [11, 12, 13, 14, 15]
    assert tried == [5, 2, 3, 1, 2]


def test_what_is_too_large_alone_is_an_error_that_says_so() -> None:
    def work(batch: list[int]) -> list[int]:
        raise MemoryError("8 GiB")

    with pytest.raises(ScoringError, match=r"not enough memory to run this model on a single text .* \(8 GiB\)"):
        in_halves(_run, work, [1, 2])


def test_other_errors_go_up_unchanged_and_at_once() -> None:
    tried: list[int] = []

    def work(batch: list[int]) -> list[int]:
        tried.append(len(batch))
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        in_halves(_run, work, [1, 2])
    assert tried == [2]


def test_a_view_scores_on_in_smaller_batches(build: Any, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    texts, refused = ["the sun", "the moon rises", "the cat sat"], []
    embed = torch.nn.Embedding.forward

    def refuse_batches(self: Any, ids: Any) -> Any:
        if ids.numel() > 4:
            refused.append(ids.numel())
            raise MemoryError
        return embed(self, ids)

    with build(base).as_base() as view:
        expected = [rolling.total_logprob for rolling in view.rolling_logprobs(texts)]
        monkeypatch.setattr(torch.nn.Embedding, "forward", refuse_batches)
        found = [rolling.total_logprob for rolling in view.rolling_logprobs(texts)]
    assert refused[-2:] == [9, 6], "all three at once, then two of them, after the trials under the patch"
    assert found == pytest.approx(expected, abs=2e-4)
