"""Encode a test's questions as token ids, and join the log-probabilities of windows."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pytest_sway.backends.text import tokens as tokenisation
from pytest_sway.backends.text.chat import prompt_text
from pytest_sway.backends.text.tokens import Ids, Window
from pytest_sway.errors import SwayWarning
from pytest_sway.protocols import RollingLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pytest_sway.protocols import Prompt

__tracebackhide__ = True


class Encodes(Protocol):
    """The part of an engine that turns texts into tokens."""

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer."""
        ...

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads at once."""
        ...

    def require_known(self, ids: Ids) -> None:
        """Raise `ScoringError` for a token that the model has no embedding for."""
        ...


def warn_of_cuts(count: int, max_length: int, where: str = "beginning, as lm-evaluation-harness does") -> None:
    """Warn about prompts that were too long for the model.

    Args:
        count: How many were.
        max_length: The most tokens that the model reads of one.
        where: Where tokens were dropped, and who else does so.
    """
    if count:
        warn_at_call(
            f"{count} of the prompts are too long: the model reads at most {max_length} tokens of them. Tokens were"
            f" dropped from their {where}."
        )


def warn_at_call(message: str) -> None:
    """Warn at the test's line that called the view."""
    ours, level = __name__.partition(".")[0], 1
    while sys._getframe(level).f_globals.get("__name__", "").partition(".")[0] == ours:
        level += 1
    warnings.warn(message, SwayWarning, stacklevel=level + 1)


def encoded_prompts(engine: Encodes, prompts: Sequence[Prompt]) -> tuple[list[Ids], int]:
    """Return the token ids of prompts, and the most tokens that the model reads at once."""
    encoded = []
    for prompt in prompts:
        text, rendered = prompt_text(engine.tokenizer, prompt)
        encoded.append(tokenisation.encode_prompt(engine.tokenizer, text, rendered=rendered))
        engine.require_known(encoded[-1])
    return encoded, engine.max_length


def encoded_pairs(engine: Encodes, pairs: Sequence[tuple[Prompt, str]]) -> tuple[list[Window], int]:
    """Return a window for each pair, and the most tokens that the model reads at once."""
    windows = []
    for prompt, completion in pairs:
        text, rendered = prompt_text(engine.tokenizer, prompt)
        windows.append(tokenisation.encode_pair(engine.tokenizer, text, completion, rendered=rendered))
        engine.require_known(windows[-1].context + windows[-1].scored)
    return windows, engine.max_length


def encoded_texts(engine: Encodes, texts: Sequence[str], prefix: bool) -> tuple[list[Ids], int]:
    """Return the token ids of texts, and the most tokens that the model reads at once."""
    encoded = []
    for text in texts:
        encoded.append(tokenisation.encode_text(engine.tokenizer, text, prefix=prefix))
        engine.require_known(encoded[-1])
    return encoded, engine.max_length


def rolling(ids: Ids, logprobs: Sequence[NDArray[np.float32]]) -> RollingLogprob:
    """Join the log-probabilities of a text's windows into one answer."""
    joined = np.concatenate([np.array([], dtype=np.float32), *logprobs])
    return RollingLogprob(np.array(ids, dtype=np.int64), joined, len(ids), float(joined.sum()))
