"""Answer a view's questions one after the other, in their order.

Texts are tokenised, cut and put into windows as in kind ``hf``, so that both kinds agree. ``run(work, *args)`` is the
view's: it returns ``work(engine, *args)``, and is called once for each question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.mlx.model.engine import Engine
from pytest_sway.backends.text import tokens
from pytest_sway.backends.text.requests import encoded_pairs, encoded_prompts, encoded_texts, rolling, warn_of_cuts
from pytest_sway.protocols import RollingLogprob, TokenDist

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Prompt

    Run = Callable[..., Any]
    Ids = tuple[int, ...]

__tracebackhide__ = True


def logprobs_of(run: Run, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
    """Return the sum of the log-probabilities of each completion's tokens given its prompt, in nats, in order."""
    encoded, max_length = run(encoded_pairs, pairs)
    windows = [tokens.cut_left(window, max_length) for window in encoded]
    warn_of_cuts(sum(a != b for a, b in zip(windows, encoded, strict=True)), max_length)
    found = {window: run(Engine.logprobs, window) for window in dict.fromkeys(windows)}
    return [float(found[window].sum()) for window in windows]


def rolling_logprobs(run: Run, texts: Sequence[str], prefix: bool) -> list[RollingLogprob]:
    """Return the log-probability of each token of each text given those before it, in nats, in order."""
    encoded, max_length = run(encoded_texts, texts, prefix)
    answers = []
    for ids in encoded:
        windows = list(tokens.rolling_windows(ids, max_length))
        answers.append(rolling(ids, [run(Engine.logprobs, window) for window in windows]))
    return answers


def next_token_dists(run: Run, prompts: Sequence[Prompt], top_k: int) -> list[TokenDist]:
    """Return the distribution of the token after each prompt, cut to the ``top_k`` most probable, in order."""
    encoded, max_length = run(encoded_prompts, prompts)
    warn_of_cuts(sum(len(ids) > max_length for ids in encoded), max_length)
    return [run(Engine.dist, ids[-max_length:], top_k) for ids in encoded]


def generate_many(run: Run, prompts: Sequence[Prompt], settings: SamplingParams, seeds: Sequence[int]) -> list[str]:
    """Continue each prompt with its seed, in order."""
    encoded, max_length = run(encoded_prompts, prompts)
    room = settings.room(max_length)
    warn_of_cuts(sum(len(ids) > room for ids in encoded), room)
    return [run(Engine.continued, ids[-room:], settings, seed) for ids, seed in zip(encoded, seeds, strict=True)]
