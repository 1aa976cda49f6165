"""The types of answers, and the Protocols of backends and views.

The Protocols are those of dlm-sway 0.1 (``dlm_sway.core.scoring`` and ``dlm_sway.core.model``), so one backend serves
both. Unlike in dlm-sway, any number of views may be open at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, runtime_checkable

from pytest_sway.errors import BackendUseError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation, such as ``{"role": "user", "content": "Hello"}``."""


@dataclass(frozen=True, init=False)
class Chat:
    """A conversation with arguments for the tokenizer's chat template; it can stand wherever messages can.

    Attributes:
        messages: Mappings such as ``{"role": "user", "content": "Hello"}``, in order.
        template_args: What ``tokenizer.apply_chat_template`` and the template take: ``tools``, ``documents``,
            ``enable_thinking``, ``continue_final_message``, ...
    """

    messages: tuple[Message, ...]
    template_args: Mapping[str, Any]

    def __init__(self, messages: Iterable[Message], **template_args: Any) -> None:
        several = isinstance(messages, Iterable) and not isinstance(messages, str | bytes | Mapping)
        object.__setattr__(self, "messages", tuple(messages) if several else (messages,))  # checked where it is asked
        object.__setattr__(self, "template_args", template_args)

    def __repr__(self) -> str:
        args = "".join(f", {name}={value!r}" for name, value in self.template_args.items())
        return f"Chat({list(self.messages)!r}{args})"


Prompt: TypeAlias = str | Sequence[Message] | Chat
"""A text, or messages that the tokenizer's chat template renders as a text."""

Input: TypeAlias = Prompt | tuple[str, str]
"""What a classifier reads: a text, a pair of texts, or a conversation."""


NEW_TOKENS: Final = 64
"""The most tokens that a text gets, if a test does not say."""


@dataclass(frozen=True, slots=True, eq=False)
class RollingLogprob:
    """The log-probability of each token of a text, given the tokens before it.

    Attributes:
        token_ids: int64, shape ``(N,)``: the prefix token, if there is one, and the text's tokens.
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
        """Mean of ``logprobs``, in nats per token; 0.0 if no token was scored."""
        return self.total_logprob / self.logprobs.size if self.logprobs.size else 0.0

    @property
    def perplexity(self) -> float:
        """``exp(-mean_logprob)``, at least 1."""
        return math.exp(-self.mean_logprob)


@dataclass(frozen=True, slots=True, eq=False)
class TokenDist:
    """The distribution of the next token, cut to its ``k`` most probable tokens.

    Attributes:
        token_ids: int64, shape ``(k,)``, most probable first.
        logprobs: float32, shape ``(k,)``, in nats, normalised over the whole vocabulary.
        vocab_size: Number of logits; 0 if a server does not report it.
        tail_logprob: Log of the probability mass outside the ``k`` tokens, in nats. It is ``None`` if the ``k`` tokens
            are the whole vocabulary, and 0.0 if that mass is at most 1e-12. Both mean no tail, as in dlm-sway.
        decode: Returns the texts of token ids; ``None`` if the view does not know them.
    """

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    vocab_size: int
    tail_logprob: float | None = None
    decode: Callable[[Sequence[int]], list[str]] | None = field(default=None, repr=False)

    @property
    def texts(self) -> list[str]:
        """The text that each token adds after another one, such as ``" Paris"``, in the order of ``token_ids``.

        Each access decodes them. A token that is a part of a character has the text U+FFFD.

        Raises:
            BackendUseError: The view does not know its tokens' texts.
        """
        if self.decode is None:
            raise BackendUseError(
                "this TokenDist has no texts: its backend, or its server, gives token ids alone. Decode token_ids with"
                " the model's tokenizer."
            )
        return self.decode(self.token_ids.tolist())


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """What a sequence classifier, or a reward model, says of a text.

    Attributes:
        logits: float32, shape ``(number of labels,)``, before any softmax; one number for a reward model.
        labels: The name of each, from ``id2label`` in the model's config.
    """

    logits: NDArray[np.float32]
    labels: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name of the largest logit."""
        return self.labels[int(self.logits.argmax())]


_SMALLEST_TAIL: Final = 1e-12


def log_of_tail(mass: float) -> float:
    """Return the ``tail_logprob`` for a probability mass outside the top tokens; NaN and infinity stay."""
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
        """Continue ``prompt``: greedily at temperature 0, else by sampling with ``seed``."""
        ...

    def close(self) -> None:
        """Release the view's own resources."""
        ...


@runtime_checkable
class ScoringBackend(Protocol):
    """Log-probabilities; dlm-sway's ``ScoringBackend``."""

    def logprob_of(self, prompt: str, completion: str) -> float:
        """Return the sum of the log-probabilities of the completion's tokens given the prompt, in nats."""
        ...

    def rolling_logprob(self, text: str) -> RollingLogprob:
        """Return the log-probability of each token of ``text`` given the tokens before it."""
        ...

    def next_token_dist(self, prompt: str, *, top_k: int = 256) -> TokenDist:
        """Return the distribution of the token after ``prompt``, cut to its ``top_k`` most probable tokens."""
        ...


@runtime_checkable
class View(Model, ScoringBackend, Protocol):
    """One side of a backend, which generates and scores."""


@runtime_checkable
class BatchView(View, Protocol):
    """A view that answers many questions in few forward passes; answers come in the order of the questions."""

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> str:
        """Continue ``prompt``, up to the first ``stop`` text: greedily at temperature 0, else by sampling."""
        ...

    def logprobs_of(self, pairs: Iterable[tuple[Prompt, str]]) -> list[float]:
        """Return `logprob_of` for each pair of a prompt and a completion."""
        ...

    def rolling_logprobs(self, texts: Iterable[str], *, prefix: bool = True) -> list[RollingLogprob]:
        """Return `rolling_logprob` for each text.

        Args:
            texts: The texts.
            prefix: Whether to put a prefix token (BOS, else EOS) before each text, so that its first token has a score.
        """
        ...

    def next_token_dists(self, prompts: Iterable[Prompt], *, top_k: int = 256) -> list[TokenDist]:
        """Return `next_token_dist` for each prompt."""
        ...

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        max_new_tokens: int = NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """Return `generate` for each prompt."""
        ...

    def render(self, messages: Iterable[Message] | Chat, **template_args: Any) -> str:
        """Render a conversation with the tokenizer's chat template, and with arguments for it."""
        ...


@runtime_checkable
class Classifier(Protocol):
    """A view of a sequence classifier or a reward model."""

    def classify(self, texts: Iterable[Input]) -> list[Classification]:
        """Return what the model says of each text."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """A view of a model for embeddings."""

    def embed(self, texts: Iterable[str], *, pooling: str | None = None) -> NDArray[np.float32]:
        """Return the embedding of each text, shape ``(number of texts, size)``."""
        ...


@runtime_checkable
class RawView(View, Protocol):
    """A view that also gives a test a model and a tokenizer of its own, for other libraries."""

    @property
    def model(self) -> Any:
        """The framework's model with this view's adapter, or without one.

        It belongs to the test, and is the same object while the view is open. It shares the base's memory and copies a
        tensor on write, so changes to it affect neither the answers of views nor other tests.
        """
        ...

    @property
    def tokenizer(self) -> Any:
        """The framework's tokenizer, a copy that belongs to the test."""
        ...


@runtime_checkable
class DifferentialBackend(Protocol):
    """A base model and its fine-tuned model."""

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
        """Open a view with the adapter's LoRA terms multiplied by ``lam``: 1 is the adapter.

        0 is the base if the adapter has LoRA terms only. Other parts of it stay as they are.
        """
        ...


@runtime_checkable
class NullCalibratedBackend(DifferentialBackend, Protocol):
    """A differential backend that can replace its adapter's weights by noise."""

    def as_null_adapter(
        self, seed: int, *, init_scale: float = 0.02, rank_scale: float = 1.0
    ) -> AbstractContextManager[View]:
        """Open a view on the adapter with numbers from ``N(0, init_scale**2 * rank_scale)`` in its LoRA matrices."""
        ...


@runtime_checkable
class PreflightCheckable(Protocol):
    """A backend that can check whether its answers are finite."""

    def preflight_finite_check(self) -> tuple[bool, str]:
        """Return ``(True, "")`` if they are, else ``(False, reason)``."""
        ...


@runtime_checkable
class Inspectable(Protocol):
    """A backend that can tell what has changed since its load."""

    def changes(self) -> list[str]:
        """Return one line for each change since the load."""
        ...
