"""Shows whether a model generates as it scores, by a few tokens: with transformers' cache, or in rows with ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.generation.continuing import left_padded, plain_settings
from pytest_sway.backends.hf.generation.decoding import GrowingTexts
from pytest_sway.backends.hf.scoring.body_and_head import agree, trial_tokens
from pytest_sway.backends.hf.scoring.scores import next_logits
from pytest_sway.backends.libraries.out_of_memory import out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_sway.backends.hf.scoring.engine import Engine

__tracebackhide__ = True

PADDED: Final = (2, 7)
EQUAL: Final = (3, 3)
ALONE: Final = (3,)
"""Lengths of the prompts in a trial of transformers' `generate`."""

_IN_A_ROW: Final = (6, 2, 5)
"""Lengths of the prompts in a trial of `GrowingTexts`."""

_STEPS: Final = 3
"""Tokens that a trial generates: a faulty state or cache shows from the second or third one on."""


def continues(engine: Engine, lengths: tuple[int, ...]) -> bool:
    """Return whether transformers' `generate` continues prompts of these lengths as the model scores them; tried once.

    This fails if a recurrent state takes in padding or is made for one text at a time; if virtual tokens come before
    the padding; or if later tokens change what a token computes.
    """
    return _known(engine, lengths, _by_transformers)


def decodes(engine: Engine) -> bool:
    """Return whether the model continues prompts of any lengths in rows as it scores them; tried once."""
    return _known(engine, _IN_A_ROW, _in_rows)


def _known(engine: Engine, lengths: tuple[int, ...], try_it: Callable[..., Any]) -> bool:
    trials = engine.forward.trials
    known = trials.continues
    if trials.looks_ahead:
        return False
    if lengths not in known:
        tokens = trial_tokens(engine.forward.model) * 2
        prompts = [tokens[i : i + length] for i, length in enumerate(lengths)]
        try:
            known[lengths] = _as_scored(engine, list(try_it(engine, prompts)))
        except Exception as error:  # a model without a cache, or with one of its own kind, can fail in any way
            if out_of_memory(error):  # which shows nothing of the model: the next call tries again
                return False
            trials.failed()
            known[lengths] = False
    return known[lengths]


def _by_transformers(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield texts with the logits of their next token."""
    fields = {"max_new_tokens": _STEPS, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    arguments = left_padded(engine, prompts, 0)
    with plain_settings(engine, **fields) as plain:
        output = engine.model.generate(generation_config=plain, **arguments)
    made = output.sequences[:, arguments["input_ids"].shape[1] :].tolist()
    for step, logits in enumerate(output.logits):
        for prompt, new, row in zip(prompts, made, logits, strict=True):
            yield prompt + tuple(new[:step]), row


def _in_rows(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield texts with the logits of their next token. The first text is dropped on the way."""
    texts, grown = list(prompts), GrowingTexts(engine.forward, prompts, _STEPS)
    for step in range(_STEPS):
        yield from zip(texts, grown.logits, strict=True)
        tokens = grown.logits.argmax(-1)
        if step == 1:
            kept = grown.drop([0])
            texts, tokens = [texts[i] for i in kept], tokens[kept]
        if step + 1 < _STEPS:
            grown.grow(tokens)
            texts = [(*text, token) for text, token in zip(texts, tokens.tolist(), strict=True)]


def _as_scored(engine: Engine, found: Sequence[tuple[tuple[int, ...], Any]]) -> bool:
    import torch

    scored = dict(next_logits(engine, list(dict.fromkeys(text for text, _ in found))))
    rows, expected = [row for _, row in found], [scored[text] for text, _ in found]
    return agree(torch.stack(rows), torch.stack(expected), engine.forward.dtype)
