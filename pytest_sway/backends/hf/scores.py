"""From texts to numbers: tokenisation, one forward pass, log-probabilities.

Nothing here knows of adapters: the model that is passed is in the state that is meant.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pytest_sway.backends.hf.libraries import PROCESS_STATE
from pytest_sway.errors import ScoringError
from pytest_sway.scoring import RollingLogprob, TokenDist

if TYPE_CHECKING:
    from collections.abc import Sequence

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

CHUNK_POSITIONS: Final = 64
"""Positions whose logits are turned into float32 at once."""

_SMALLEST_TAIL: Final = 1e-12


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of ``text``, with the special tokens that the tokenizer adds unless told otherwise."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int]:
    """Tokenise a pair as lm-evaluation-harness does in ``TemplateLM._encode_pair``.

    The prompt's trailing whitespace goes to the completion, and the text is tokenised as one. An empty prompt is stood
    for by the token that begins a text.

    Returns:
        The ids of the whole, and how many of them are the completion's.

    Raises:
        ScoringError: The completion has no tokens, or the prompt is empty and nothing can stand for it.
    """
    stripped = prompt.rstrip()
    completion, context = prompt[len(stripped) :] + completion, stripped
    prefix = encode(tokenizer, context) if context else []
    if prefix:
        whole = encode(tokenizer, context + completion)
    else:
        prefix = [_first_token(tokenizer)]
        whole = prefix + encode(tokenizer, completion, special=False)
    scored = len(whole) - len(prefix)
    if scored <= 0:
        raise ScoringError(
            f"the completion {completion!r} has no tokens after the prompt {prompt[-80:]!r}; there is nothing to score."
        )
    return whole, scored


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a prompt; an empty one is stood for by the token that begins a text.

    Raises:
        ScoringError: It is empty, and the tokenizer has no such token.
    """
    return encode(tokenizer, prompt) or [_first_token(tokenizer)]


def _first_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ScoringError("the prompt is empty, and the tokenizer has no BOS or EOS token that could stand for it.")


def last_logits(model: Any, ids: Sequence[int], count: int, argument: str | None) -> Any:
    """Compute the logits at the last ``count`` positions.

    Args:
        model: The model.
        ids: Token ids.
        count: How many positions are needed.
        argument: The argument of the model's forward that leaves out the others; ``None`` if it has none.

    Returns:
        A tensor of shape ``(count, vocabulary)`` in the model's dtype.
    """
    import torch

    inputs = torch.tensor([ids], device=model.device)
    only = {} if argument is None else {argument: count}
    return model(input_ids=inputs, **only).logits[0, -count:]


def token_logprobs(logits: Any, targets: Sequence[int]) -> Any:
    """Return the log-probability of each target, in nats: float32, shape ``(len(targets),)``, on the CPU.

    The normaliser is a log-sum-exp over a few positions at a time, so that no float32 copy of all logits is made.
    """
    import torch

    wanted: Any = torch.tensor(targets, device=logits.device).unsqueeze(-1)
    parts = []
    for rows, columns in zip(logits.split(CHUNK_POSITIONS), wanted.split(CHUNK_POSITIONS), strict=True):
        chunk = rows.float()
        parts.append(chunk.gather(-1, columns).squeeze(-1) - chunk.logsumexp(-1))
    return torch.cat(parts).cpu()


def logprob_of(model: Any, tokenizer: Any, argument: str | None, prompt: str, completion: str) -> float:
    """Sum of the log-probabilities of the completion's tokens given the prompt, in nats."""
    ids, scored = encode_pair(tokenizer, prompt, completion)
    logits = last_logits(model, ids[:-1], scored, argument)
    return float(token_logprobs(logits, ids[-scored:]).sum())


def rolling_logprob(model: Any, tokenizer: Any, argument: str | None, text: str) -> RollingLogprob:
    """Log-probability of each token of ``text`` given those before it."""
    ids = encode(tokenizer, text)
    if len(ids) < 2:
        return RollingLogprob(np.array(ids, dtype=np.int64), np.array([], dtype=np.float32), len(ids), 0.0)
    logprobs = token_logprobs(last_logits(model, ids[:-1], len(ids) - 1, argument), ids[1:])
    return RollingLogprob(np.array(ids, dtype=np.int64), logprobs.numpy(), len(ids), float(logprobs.sum()))


def next_token_dist(model: Any, tokenizer: Any, argument: str | None, prompt: str, top_k: int) -> TokenDist:
    """Distribution of the token after ``prompt``, cut to the ``top_k`` most probable."""
    import torch

    if top_k < 1:
        raise ScoringError(f"top_k must be at least 1, not {top_k}.")
    logits = last_logits(model, encode_prompt(tokenizer, prompt), 1, argument)[0]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    vocabulary = int(logprobs.shape[0])
    top = torch.topk(logprobs, k=min(top_k, vocabulary))
    tail: float | None = None
    if top_k < vocabulary:
        mass = float(1.0 - torch.exp(top.values).sum())
        tail = math.log(mass) if mass > _SMALLEST_TAIL else (0.0 if math.isfinite(mass) else mass)
    return TokenDist(top.indices.cpu().numpy(), top.values.cpu().numpy(), vocabulary, tail)


def generate(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """Continue ``prompt``: greedily at temperature 0, else sampled from ``seed``; the global random state stays."""
    import torch

    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "attention_mask": torch.ones_like(ids),
    }
    if temperature > 0.0:
        settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
        with PROCESS_STATE, torch.random.fork_rng(devices=_cuda_devices(ids.device)):
            torch.manual_seed(seed)
            output = model.generate(input_ids=ids, **settings)
    else:
        settings |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        output = model.generate(input_ids=ids, **settings)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def _cuda_devices(device: Any) -> list[Any]:
    return [device] if device.type == "cuda" else []
