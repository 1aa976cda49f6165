"""Chooses the next token from logits, as transformers' logits processors do in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_sway.backends.questions import SamplingParams

__tracebackhide__ = True


def chooser(settings: SamplingParams, ids: Sequence[int], seed: int) -> Callable[[Any, Sequence[int]], Any]:
    """Return a function of logits, and of the new tokens before them, that chooses the next token.

    Args:
        settings: The call's settings.
        ids: The prompt's tokens.
        seed: The seed of the function's own keys; MLX's random state takes no part.
    """
    choose = _sampler(settings, seed) if settings.temperature > 0.0 else _greedy
    penalty = settings.repetition_penalty
    if penalty == 1.0:
        return lambda logits, _new: choose(logits)
    return lambda logits, new: choose(penalised(logits, (*ids, *new), penalty))


def _greedy(logits: Any) -> Any:
    """Return the most probable token."""
    import mlx.core as mx

    return mx.argmax(logits)


def _sampler(settings: SamplingParams, seed: int) -> Callable[[Any], Any]:
    """Return a function that samples tokens with keys of its own."""
    import mlx.core as mx

    key = mx.random.key(seed % 2**64)

    def choose(logits: Any) -> Any:
        nonlocal key
        key, now = mx.random.split(key)
        return mx.random.categorical(filtered(logits, settings), key=now)

    return choose


def filtered(logits: Any, settings: SamplingParams) -> Any:
    """Return logits at a temperature, with -inf for the tokens that the settings leave out."""
    import mlx.core as mx

    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        least = mx.sort(logits)[-settings.top_k]
        logits = mx.where(logits < least, -mx.inf, logits)
    if settings.top_p < 1.0:
        logits = _nucleus(logits, settings.top_p)
    if settings.min_p:
        probabilities = mx.softmax(logits)
        logits = mx.where(probabilities < settings.min_p * probabilities.max(), -mx.inf, logits)
    return logits


def penalised(logits: Any, said: Sequence[int], penalty: float) -> Any:
    """Return logits that are lower for the tokens that were said."""
    import mlx.core as mx

    ids = mx.array(sorted(set(said)))
    before = logits[ids]
    logits[ids] = mx.where(before < 0, before * penalty, before / penalty)
    return logits


def _nucleus(logits: Any, top_p: float) -> Any:
    """Set all logits to -inf but those of the smallest set of most probable tokens with a mass of ``top_p``."""
    import mlx.core as mx

    order = mx.argsort(-logits)
    probabilities = mx.softmax(logits[order])
    before = mx.cumsum(probabilities) - probabilities
    kept = mx.where(before < top_p, logits[order], -mx.inf)
    return kept[mx.argsort(order)]
