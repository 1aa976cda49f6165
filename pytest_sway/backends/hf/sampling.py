"""Makes transformers' logits processors and stopping criteria of a call's settings, with rows that do not mix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.text.stopping import has_stopped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_sway.backends.questions import SamplingParams

__tracebackhide__ = True


def processors(settings: SamplingParams, prompts: Sequence[Sequence[int]], seeds: Sequence[int | None]) -> list[Any]:
    """Return logits processors whose most probable token is the next one, in the order in which transformers has them.

    Args:
        settings: The call's settings.
        prompts: The token ids of each row's prompt, which are padded on the left.
        seeds: The seed of each row.
    """
    penalty = settings.repetition_penalty
    steps = [] if penalty == 1.0 else [RowPenalty(penalty, prompts)]
    return steps if settings.temperature == 0.0 else [*steps, *_warpers(settings), RowNoise(seeds)]


def _warpers(settings: SamplingParams) -> list[Any]:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps: list[Any] = [TemperatureLogitsWarper(settings.temperature)]
    if settings.top_k:
        steps.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        steps.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        steps.append(MinPLogitsWarper(settings.min_p))
    return steps


class RowPenalty:
    """transformers' repetition penalty, which counts a row's padding as nothing that was said.

    Args:
        penalty: The penalty.
        prompts: The token ids of each row's prompt, which are padded on the left.
    """

    def __init__(self, penalty: float, prompts: Sequence[Sequence[int]]) -> None:
        import torch
        from transformers import RepetitionPenaltyLogitsProcessor

        self._penalise: Any = RepetitionPenaltyLogitsProcessor(penalty)
        self._longest = max(map(len, prompts))
        self._own: Any = torch.tensor([[*[ids[0]] * (self._longest - len(ids)), *ids] for ids in prompts])

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows, in this order."""
        self._own = self._own[list(rows)]

    def __call__(self, ids: Any, scores: Any) -> Any:
        """Return the scores with the penalty."""
        import torch

        self._own = self._own.to(ids.device)
        return self._penalise(torch.cat([self._own, ids[:, self._longest :]], dim=1), scores)


class RowNoise:
    """A logits processor that turns greedy decoding into sampling, row by row.

    The token whose logit plus Gumbel noise is highest is a sample from the softmax. Each row has the noise of its seed,
    made on the CPU. So a row gives the same sample alone and in a batch, on any device, and the process's random state
    does not matter. Noise takes longer than all else on a GPU, so rows of one seed share it.

    Args:
        seeds: The seed of each row.
    """

    def __init__(self, seeds: Sequence[int | None]) -> None:
        import torch

        self._seeds = [int(seed or 0) for seed in seeds]
        self._generators = {seed: torch.Generator(device="cpu").manual_seed(seed) for seed in self._seeds}

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows, in this order."""
        self._seeds = [self._seeds[row] for row in rows]

    def __call__(self, _ids: Any, scores: Any) -> Any:
        """Return the scores with new noise."""
        import torch

        seeds = self._seeds if len(set(self._seeds)) > 1 else self._seeds[:1]
        pinned = scores.device.type == "cuda"  # a copy from other memory waits for the card
        noise = torch.empty(len(seeds), scores.shape[-1], pin_memory=pinned)
        first: dict[int, int] = {}
        for i, seed in enumerate(seeds):
            if first.setdefault(seed, i) == i:
                noise[i].exponential_(generator=self._generators[seed])
            else:
                noise[i] = noise[first[seed]]
        return scores - noise.log_().to(scores.device, non_blocking=True)


def keep_rows(steps: Sequence[Any], rows: Sequence[int]) -> None:
    """Let logits processors continue with these rows, in this order."""
    for step in steps:
        if isinstance(step, RowPenalty | RowNoise):
            step.keep(rows)


def stopping(tokenizer: Any, stop: Sequence[str], width: int) -> Any:
    """Return a stopping criterion that ends each row at its first stop text.

    Args:
        tokenizer: Decodes the new tokens.
        stop: The stop texts.
        width: The number of tokens before the new ones.
    """
    import torch

    def criterion(ids: Any, _scores: Any, **_: Any) -> Any:
        return torch.tensor([has_stopped(tokenizer, row, stop) for row in ids[:, width:].tolist()], device=ids.device)

    return criterion
