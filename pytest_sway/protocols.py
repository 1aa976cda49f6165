"""What a backend hands out: the types of its answers and the Protocols it satisfies.

The Protocols are those of dlm-sway 0.1 (``dlm_sway.core.scoring`` and ``dlm_sway.core.model``), so that one backend
serves both. Unlike there, any number of views may be open at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation, such as ``{"role": "user", "content": "Hello"}``."""

Prompt: TypeAlias = str | Sequence[Message]
"""What is to be continued: a text, or messages, which the tokenizer's chat template makes a text of."""


@dataclass(frozen=True, slots=True, eq=False)
class RollingLogprob:
    """The log-probability of each token of a text, given the tokens before it.

    Attributes:
        token_ids: int64, shape ``(N,)``: the text's tokens, behind the prefix token if there is one.
        logprobs: float32, shape ``(max(N - 1, 0),)``, in nats: ``log p(token[i] | token[:i])`` for ``i >= 1``.
        num_tokens: ``N``.
        total_logprob: Sum of ``logprobs``, in nats.
    """

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    num_tokens: int
    total_logprob: float

    @property
    def mean_logprob(self) -> float:
        """Nats per scored token; 0.0 where no token was scored."""
        return self.total_logprob / self.logprobs.size if self.logprobs.size else 0.0

    @property
    def perplexity(self) -> float:
        """``exp(-mean_logprob)``: the natural perplexity, at least 1."""
        return math.exp(-self.mean_logprob)


@dataclass(frozen=True, slots=True, eq=False)
class TokenDist:
    """The distribution of the next token, cut to its ``k`` most probable tokens.

    Attributes:
        token_ids: int64, shape ``(k,)``, most probable first.
        logprobs: float32, shape ``(k,)``, in nats, normalised over the whole vocabulary.
        vocab_size: Size of the vocabulary that the logits cover; 0 where a server does not tell it.
        tail_logprob: Log of the mass outside the ``k`` tokens; ``None`` where they are the whole vocabulary, and 0.0
            where the mass is too small to be told from none (dlm-sway's convention: both mean no tail).
    """

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    vocab_size: int
    tail_logprob: float | None = None


_SMALLEST_TAIL: Final = 1e-12


def log_of_tail(mass: float) -> float:
    """Return the ``tail_logprob`` of a distribution whose tokens leave a mass to others; NaN and infinity stay."""
    return math.log(mass) if mass > _SMALLEST_TAIL else 0.0 if math.isfinite(mass) else mass


@runtime_checkable
class Model(Protocol):
    """Text generation; dlm-sway's ``Model``."""

    id: str

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continue ``prompt``; greedy at temperature 0, else sampled from ``seed``."""
        ...

    def close(self) -> None:
        """Release what this view itself holds."""
        ...


@runtime_checkable
class ScoringBackend(Protocol):
    """Log-probabilities; dlm-sway's ``ScoringBackend``."""

    def logprob_of(self, prompt: str, completion: str) -> float:
        """Sum of the log-probabilities of the completion's tokens given the prompt, in nats."""
        ...

    def rolling_logprob(self, text: str) -> RollingLogprob:
        """Log-probability of each token of ``text`` given those before it."""
        ...

    def next_token_dist(self, prompt: str, *, top_k: int = 256) -> TokenDist:
        """Distribution of the token after ``prompt``."""
        ...


@runtime_checkable
class View(Model, ScoringBackend, Protocol):
    """One side of a backend: generation and scoring in one state of the model."""


@runtime_checkable
class BatchView(View, Protocol):
    """A view that answers many questions in few forward passes; answers come in the order of the questions."""

    def logprobs_of(self, pairs: Iterable[tuple[Prompt, str]]) -> list[float]:
        """`logprob_of` for each pair of a prompt and a completion."""
        ...

    def rolling_logprobs(self, texts: Iterable[str], *, prefix: bool = True) -> list[RollingLogprob]:
        """`rolling_logprob` for each text; ``prefix`` is ``True`` by default for every kind of backend.

        With it, all of a text's own tokens are scored, behind the token that begins a text.
        """
        ...

    def next_token_dists(self, prompts: Iterable[Prompt], *, top_k: int = 256) -> list[TokenDist]:
        """`next_token_dist` for each prompt."""
        ...

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """`generate` for each prompt."""
        ...

    def render(self, messages: Iterable[Message]) -> str:
        """Return what the tokenizer's chat template makes of a conversation."""
        ...


@runtime_checkable
class RawView(View, Protocol):
    """A view that also gives a test a model and a tokenizer of its own, for other libraries."""

    @property
    def model(self) -> Any:
        """The framework's model, with exactly this view's adapter or none.

        It is the test's own: the same object for as long as the view is open, and nobody else's. It shares the memory
        of the weights that nobody writes to. What a test does to it reaches no view's answers and no other test.
        """
        ...

    @property
    def tokenizer(self) -> Any:
        """The framework's tokenizer, with settings of the test's own."""
        ...


@runtime_checkable
class DifferentialBackend(Protocol):
    """A base model and its fine-tuned self."""

    def as_base(self) -> AbstractContextManager[View]:
        """Open a view on the base model."""
        ...

    def as_finetuned(self) -> AbstractContextManager[View]:
        """Open a view on the fine-tuned model."""
        ...


@runtime_checkable
class ScalableDifferentialBackend(DifferentialBackend, Protocol):
    """A differential backend whose adapter can be scaled."""

    def as_scaled_adapter(self, lam: float) -> AbstractContextManager[View]:
        """Open a view in which the adapter's additive term counts ``lam`` times: 0 is the base, 1 the adapter."""
        ...


@runtime_checkable
class NullCalibratedBackend(DifferentialBackend, Protocol):
    """A differential backend that can put noise in the adapter's place."""

    def as_null_adapter(
        self, seed: int, *, init_scale: float = 0.02, rank_scale: float = 1.0
    ) -> AbstractContextManager[View]:
        """Open a view whose adapter has the same structure and weights from ``N(0, init_scale**2 * rank_scale)``."""
        ...


@runtime_checkable
class PreflightCheckable(Protocol):
    """A backend that can tell whether its answers are finite."""

    def preflight_finite_check(self) -> tuple[bool, str]:
        """``(True, "")``, or ``(False, reason)``."""
        ...


@runtime_checkable
class Inspectable(Protocol):
    """A backend that knows whether it is still what it was when it was loaded."""

    def changes(self) -> list[str]:
        """One line for each thing that is no longer as it was after the load; empty when nothing is."""
        ...
