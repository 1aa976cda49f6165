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
    steps = [] if penalty == 1.0 else [_penalty(penalty, prompts)]
    return steps if settings.temperature == 0.0 else [*steps, *_warpers(settings), _noise(seeds)]


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


def _penalty(penalty: float, prompts: Sequence[Sequence[int]]) -> Any:
    """Return transformers' repetition penalty, which counts a row's padding as nothing that was said."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    penalise: Any = RepetitionPenaltyLogitsProcessor(penalty)
    longest = max(map(len, prompts))
    own = torch.tensor([[*[ids[0]] * (longest - len(ids)), *ids] for ids in prompts])

    def process(ids: Any, scores: Any) -> Any:
        return penalise(torch.cat([own.to(ids.device), ids[:, longest:]], dim=1), scores)

    return process


def _noise(seeds: Sequence[int | None]) -> Any:
    """Return a logits processor that turns greedy decoding into sampling, row by row.

    The token whose logit plus Gumbel noise is highest is a sample from the softmax. Each row has its own noise
    generator, on the CPU. So a row gives the same sample alone and in a batch, on any device, and the process's random
    state does not matter.
    """
    import torch

    generators = [torch.Generator(device="cpu").manual_seed(int(seed or 0)) for seed in seeds]

    def add_noise(_ids: Any, scores: Any) -> Any:
        noise = [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in generators]
        return scores - torch.stack(noise).log_().to(scores.device)

    return add_noise


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
