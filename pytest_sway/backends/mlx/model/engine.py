"""`Engine`: run token ids through an MLX model, for log-probabilities and new tokens.

It knows nothing of adapters or views. MLX is lazy, so everything is evaluated before it is returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pytest_sway.backends.mlx.model.libraries import mlx_lm_module
from pytest_sway.backends.mlx.model.sampling import chooser
from pytest_sway.backends.text import tokens
from pytest_sway.backends.text.stopping import ends_of, has_stopped, stopped_text
from pytest_sway.errors import ScoringError
from pytest_sway.protocols import TokenDist, log_of_tail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.backends.text.tokens import Window

__tracebackhide__ = True

CHUNK_POSITIONS: Final = 128
"""The number of positions whose logits are in memory at once."""

PREFILL_POSITIONS: Final = 2048
"""The number of positions that go through the model at once if no logits are wanted."""

_BLOCK: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """A model with its tokenizer.

    Attributes:
        model: A model of mlx-lm.
        tokenizer: The Hugging Face tokenizer.
        config: The model's configuration, as attributes.
        embedded: The number of tokens that the model has embeddings for; ``None`` if unknown.
        exact_length: The most tokens that it attends to as transformers' class does; ``None`` for any number.
    """

    model: Any
    tokenizer: Any
    config: Any
    embedded: int | None
    exact_length: int | None

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads at once."""
        return tokens.max_length_of(self.config, self.tokenizer)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return ends_of(getattr(self.config, "eos_token_id", None), self.tokenizer)

    def require_known(self, ids: Sequence[int]) -> None:
        """Raise `ScoringError` for a token that the model has no embedding for."""
        tokens.require_known(self.tokenizer, ids, self.embedded)

    def logprobs(self, window: Window) -> NDArray[np.float32]:
        """Return the log-probability of each scored token of a window given those before it, in nats."""
        import mlx.core as mx

        self._require_exact(len(window.context) + len(window.scored) - 1)  # the last token is not read
        cache = self._prefilled(window.context[:-1])
        ids = (window.context[-1], *window.scored)
        parts = []
        for start in range(0, len(window.scored), CHUNK_POSITIONS):
            end = min(start + CHUNK_POSITIONS, len(window.scored))
            logits = self.model(mx.array([ids[start:end]]), cache=cache)[0].astype(mx.float32)
            chosen = mx.take_along_axis(logits, mx.array(ids[start + 1 : end + 1])[:, None], axis=-1)
            part = chosen[:, 0] - _log_normaliser(logits)
            mx.eval(part)
            parts.append(np.array(part))
        return np.concatenate(parts)

    def dist(self, ids: Sequence[int], top_k: int) -> TokenDist:
        """Return the distribution of the token after a prompt, cut to the ``top_k`` most probable."""
        import mlx.core as mx

        self._require_exact(len(ids))
        logits = self._last_logits(ids, self._prefilled(ids[:-1]))
        logprobs = logits - _log_normaliser(logits)
        vocabulary = int(logprobs.shape[-1])
        k = min(top_k, vocabulary)
        order = mx.argsort(-logprobs)[:k]
        top = logprobs[order]
        mass = float((1.0 - mx.exp(top).sum()).item())
        tail = None if k == vocabulary else log_of_tail(mass)
        return TokenDist(np.array(order).astype(np.int64), np.array(top), vocabulary, tail)

    def continued(self, ids: Sequence[int], settings: SamplingParams, seed: int) -> str:
        """Continue a prompt and return the new text, without special tokens."""
        self._require_exact(len(ids))
        choose, stop = chooser(settings, ids, seed), settings.stop
        cache, last, new = self._prefilled(ids[:-1]), ids[-1:], list[int]()
        while len(new) < settings.max_new_tokens and not (new and self._has_ended(new, stop)):
            self._require_exact(len(ids) + len(new))
            new.append(int(choose(self._last_logits(last, cache), new).item()))
            last = new[-1:]
        return stopped_text(self.tokenizer, new, stop)

    def _require_exact(self, length: int) -> None:
        """Raise `ScoringError` for a text that the model would compute otherwise than transformers' class does."""
        if self.exact_length is not None and length > self.exact_length:
            raise ScoringError(
                f"the model would read {length} tokens of this text, and its numbers are right for {self.exact_length}"
                f" at most: mlx-lm's {self.config.model_type} and transformers' have different sliding windows (or"
                " attention chunks). Use kind='hf', or shorter texts."
            )

    def _has_ended(self, new: Sequence[int], stop: Sequence[str]) -> bool:
        return new[-1] in self.ends or bool(stop and has_stopped(self.tokenizer, new, stop))

    def _prefilled(self, ids: Sequence[int]) -> Any:
        """Return a key-value cache that holds some tokens. Their logits are never evaluated, so they cost nothing."""
        import mlx.core as mx

        cache = mlx_lm_module("models.cache").make_prompt_cache(self.model)
        for start in range(0, len(ids), PREFILL_POSITIONS):
            self.model(mx.array([ids[start : start + PREFILL_POSITIONS]]), cache=cache)
            mx.eval([layer.state for layer in cache])
        return cache

    def _last_logits(self, ids: Sequence[int], cache: Any) -> Any:
        import mlx.core as mx

        return self.model(mx.array([ids[-1:]]), cache=cache)[0, -1].astype(mx.float32)


def _log_normaliser(logits: Any) -> Any:
    """Return the log-sum-exp over the last axis, in two steps.

    On a CPU, MLX adds up a row of float32 one number after the other. Over a vocabulary of 49,152 that loses 1e-4 nats,
    always in the same direction, so the errors of many tokens add up. In blocks it loses 2e-6.
    """
    import mlx.core as mx

    missing = -logits.shape[-1] % _BLOCK
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
    blocks = mx.pad(logits, padding, constant_values=-mx.inf).reshape(*logits.shape[:-1], -1, _BLOCK)
    return mx.logsumexp(mx.logsumexp(blocks, axis=-1), axis=-1)
