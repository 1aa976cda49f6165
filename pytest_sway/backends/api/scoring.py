"""Turn a server's answers into numbers."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_sway.backends.api.served_model import EXTRAS
from pytest_sway.backends.questions import SamplingParams, checked_messages, until
from pytest_sway.errors import ScoringError
from pytest_sway.protocols import RollingLogprob, TokenDist, log_of_tail

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_sway.backends.api.completions import Echo, Token
    from pytest_sway.backends.api.served_model import ServedModel
    from pytest_sway.protocols import Prompt

__tracebackhide__ = True


async def logprob_of(model: ServedModel, prompt: Prompt, completion: str) -> float:
    """Return the sum of the log-probabilities of the completion's tokens, in nats.

    The text is split as in lm-evaluation-harness: trailing whitespace of the prompt goes to the completion, both are
    tokenised as one text, and the completion's tokens are those after as many as the prompt alone has. If a token
    straddles the boundary, the completion is scored in the text as it is, since a server takes nothing else. The
    harness, which has the model itself, puts the prompt's own tokens before them.
    """
    prompt = _text(model, prompt)
    context, text = prompt.rstrip(), prompt + completion
    scored: Sequence[Token] = ()
    if len(text) > len(context):
        await model.require_echo()
        echo = await model.echo(text)
        scored = echo.tokens[await _tokens_of_prompt(model, echo, context) :]
    if not scored:
        raise ScoringError(
            f"the completion {completion!r} has no tokens after the prompt {prompt[-80:]!r}; there is nothing to score."
        )
    return math.fsum(_logprobs(model, scored))


async def rolling_logprob(model: ServedModel, text: str, prefix: bool) -> RollingLogprob:
    """Return the log-probability, in nats, of each token but the first, which is the server's BOS if it shows one."""
    if not text:
        return RollingLogprob(np.array([], np.int64), np.array([], np.float32), 0, 0.0)
    await model.require_echo()
    if prefix and not model.shows_bos:
        raise ScoringError(
            f"rolling_logprob scores every token of a text by default, but {model} shows no BOS before a text, so it"
            " has no log-probability for the first token. Pass prefix=False to score the tokens after it, and compare"
            " such numbers only with others of prefix=False."
        )
    echo = await model.echo(text, ids=model.tells_ids)
    logprobs = _logprobs(model, echo.tokens[1:])
    return RollingLogprob(
        token_ids=np.array([token.token_id for token in echo.tokens], np.int64),
        logprobs=np.array(logprobs, np.float32),
        num_tokens=len(echo.tokens),
        total_logprob=math.fsum(logprobs),
    )


async def next_token_dist(model: ServedModel, prompt: Prompt, top_k: int) -> TokenDist:
    """Return the distribution of the token after ``prompt``: up to ``top_k`` tokens, as many as the server gives."""
    prompt = _text(model, prompt)
    ids = {"return_tokens_as_token_ids": True} if model.tells_ids else {}
    completion = await model.complete_scored(top_k, prompt=prompt, max_tokens=1, **ids)
    top = completion.tokens[0].top[:top_k] if completion.tokens else ()
    if not top:
        raise ScoringError(
            f"{model} gave no distribution of the token after {prompt[-80:]!r}. Servers omit it if the text ends there,"
            " and for an empty prompt."
        )
    logprobs = np.array([each.logprob for each in top], np.float32)
    tail: float | None = None
    if len(top) != model.vocabulary:
        tail = log_of_tail(1.0 - math.fsum(np.exp(logprobs.astype(np.float64))))
    texts = {each.token_id: each.text for each in top if each.text is not None}
    decode = partial(_texts, texts) if len(texts) == len(top) else None
    return TokenDist(np.array([each.token_id for each in top], np.int64), logprobs, model.vocabulary, tail, decode)


def _texts(texts: Mapping[int, str], ids: Sequence[int]) -> list[str]:
    return [texts[token] for token in ids]


async def generate(model: ServedModel, prompt: Prompt, settings: SamplingParams, seed: int) -> str:
    """Return a continuation of ``prompt``, up to the first stop text, whether or not the server ends there."""
    text = _text(model, prompt)
    request: dict[str, Any] = {
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": seed,
    }
    if settings.stop:
        request["stop"] = list(settings.stop)
    matter = EXTRAS if settings.temperature > 0.0 else ("repetition_penalty",)  # others never drop the likeliest token
    unset = SamplingParams(settings.max_new_tokens)
    extra = {name: value for name in matter if (value := getattr(settings, name)) != getattr(unset, name)}
    if extra:
        await model.require_settings(extra)
    completion = await model.complete(prompt=text, **request, **extra)
    return until(completion.text, settings.stop)


def no_template(model: ServedModel) -> ScoringError:
    """Return the error for a prompt of messages."""
    return ScoringError(
        f"a prompt of messages was given to {model}, whose chat template is unknown here. Render it as text with the"
        " model's tokenizer first: tokenizer.apply_chat_template(messages, tokenize=False)."
    )


def _text(model: ServedModel, prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        checked_messages(prompt)
        raise no_template(model)
    return prompt


async def _tokens_of_prompt(model: ServedModel, echo: Echo, context: str) -> int:
    """The number of echoed tokens that are the prompt's."""
    if not context:
        return int(echo.bos)
    if echo.starts is not None and len(context) in echo.starts:
        return echo.starts.index(len(context))
    return len((await model.echo(context)).tokens)  # a token straddles the boundary, or the places are unknown


def _logprobs(model: ServedModel, tokens: Sequence[Token]) -> list[float]:
    found = [token.logprob for token in tokens if token.logprob is not None]
    if len(found) < len(tokens):
        raise ScoringError(
            f"{model} gives no log-probability for the first token of a text, since nothing comes before it. Score a"
            " completion after a prompt."
        )
    return found
