"""`BaseView`: what a test asks of one side of a backend, of whatever kind.

Here a question is checked, and one question is many of one. How many are answered is each kind's own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pytest_sway.backends.questions import SamplingParams, checked_pair, checked_text, listed, seeds
from pytest_sway.errors import BackendClosedError, ScoringError, ViewClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Self

    from pytest_sway.protocols import Message, Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True


class ViewOwner(Protocol):
    """What a view needs of its backend."""

    def _run(self, view: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return ``work(engine, *args)``, where the engine is what computes the view's answers."""
        ...

    def _view_closed(self, view: Any) -> None:
        """Let go of what is kept for the view."""
        ...


O = TypeVar("O", bound=ViewOwner)  # noqa: E741 # a type, not a number


class BaseView(ABC, Generic[O]):
    """One side of a backend, open for the length of a ``with`` block.

    It refers to no weights itself, so a view that a test holds on to keeps nothing alive.

    Attributes:
        id: ``base``, ``ft``, ``scaled_<lam>`` or ``null_<seed>``.
    """

    def __init__(self, view_id: str, backend: O) -> None:
        self.id = view_id
        self._backend: O | None = backend

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r}{'' if self._backend else ', closed'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(self, messages: Iterable[Message]) -> str:
        """Return what the tokenizer's chat template makes of a conversation, up to where the answer begins.

        Wherever a prompt is asked for, the messages themselves will do. The template puts in all special tokens, so
        that none are added when a prompt of messages is tokenised.

        Args:
            messages: Mappings such as ``{"role": "user", "content": "Hello"}``, in order.

        Raises:
            ScoringError: There is no chat template, a message is malformed, or the template refuses them.
        """
        self._open()
        return self._rendered(messages)

    def logprob_of(self, prompt: Prompt, completion: str) -> float:
        """Return the sum of the log-probabilities of the completion's tokens given the prompt, in nats.

        The pair is tokenised as lm-evaluation-harness does: the prompt's trailing whitespace goes to the completion;
        an empty prompt is stood for by the token that begins a text (BOS, else EOS). What the model cannot read at once
        is cut from the left, with a `SwayWarning`.

        Raises:
            ScoringError: The completion has no tokens, or more than the model reads at once; or the model has no
                embedding for a token.
        """
        return self.logprobs_of([(prompt, completion)])[0]

    def logprobs_of(self, pairs: Iterable[tuple[Prompt, str]]) -> list[float]:
        """Return `logprob_of` for each pair of a prompt and a completion, in their order."""
        self._open()
        return self._logprobs([checked_pair(pair) for pair in listed(pairs, "pairs of a prompt and a completion")])

    def rolling_logprob(self, text: str, *, prefix: bool = True) -> RollingLogprob:
        """Return the log-probability of each token of ``text`` given those before it, in nats.

        A text longer than the model reads at once is cut into windows as lm-evaluation-harness's
        ``loglikelihood_rolling`` does.

        Args:
            text: The text.
            prefix: Put the token that begins a text (BOS, else EOS) before it and score all of the text's own tokens,
                as lm-evaluation-harness does; ``token_ids`` then begin with that token. Unlike there, a tokenizer that
                adds BOS of its own accord does not add a second one. With ``False``, the tokens are those that the
                tokenizer gives of its own accord, and the first is not scored, as in dlm-sway.

        Raises:
            ScoringError: A prefix is wanted, and there is neither BOS nor EOS; or the model has no embedding for a
                token.
        """
        return self.rolling_logprobs([text], prefix=prefix)[0]

    def rolling_logprobs(self, texts: Iterable[str], *, prefix: bool = True) -> list[RollingLogprob]:
        """Return `rolling_logprob` for each text, in their order."""
        self._open()
        return self._rolling([checked_text(text) for text in listed(texts, "texts")], prefix)

    def next_token_dist(self, prompt: Prompt, *, top_k: int = 256) -> TokenDist:
        """Return the distribution of the token after ``prompt``, cut to the ``top_k`` most probable tokens.

        Raises:
            ScoringError: ``top_k`` is under 1, or nothing can stand for an empty prompt.
        """
        return self.next_token_dists([prompt], top_k=top_k)[0]

    def next_token_dists(self, prompts: Iterable[Prompt], *, top_k: int = 256) -> list[TokenDist]:
        """Return `next_token_dist` for each prompt, in their order."""
        self._open()
        if top_k < 1:
            raise ScoringError(f"top_k must be at least 1, not {top_k}.")
        return self._dists(listed(prompts, "prompts"), top_k)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continue ``prompt`` and return the new text, without special tokens.

        At temperature 0 each token is the most probable one of `next_token_dist`, but for ties. It does what the
        arguments say and no more: of the base's own generation settings (a top-k, a repetition penalty, ...) only the
        tokens that end a text count. The global random state takes no part and stays as it is.

        Args:
            prompt: What to continue.
            max_new_tokens: The most tokens to add; fewer where the model ends its text.
            temperature: 0 for the most probable token each time; above, sampling.
            top_p: Sample from the smallest set of tokens with this mass.
            seed: Where sampling starts. Equal seeds give equal texts, also on another device but for rounding.

        Raises:
            ScoringError: An argument has no meaning, or leaves no room for a prompt.
        """
        return self.generate_many(
            [prompt], max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )[0]

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """Return `generate` for each prompt, in their order: what each gives alone, but for ties.

        Args:
            prompts: What to continue.
            max_new_tokens: The most tokens to add to each.
            temperature: 0 for the most probable token each time; above, sampling.
            top_p: Sample from the smallest set of tokens with this mass.
            seed: Where sampling starts: one for all prompts, so that equal prompts get equal texts, or one for each.
        """
        self._open()
        settings = SamplingParams(max_new_tokens, temperature, top_p)
        settings.check()
        asked = listed(prompts, "prompts")
        return self._continued(asked, settings, seeds(seed, len(asked)))

    def close(self) -> None:
        """Close the view; its backend stays open. Closing twice is harmless."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend._view_closed(self)

    # --- what a kind answers: the arguments are checked, and the view is open -----------------------------------------

    @abstractmethod
    def _rendered(self, messages: Iterable[Message]) -> str: ...

    @abstractmethod
    def _logprobs(self, pairs: list[tuple[Prompt, str]]) -> list[float]: ...

    @abstractmethod
    def _rolling(self, texts: list[str], prefix: bool) -> list[RollingLogprob]: ...

    @abstractmethod
    def _dists(self, prompts: list[Prompt], top_k: int) -> list[TokenDist]: ...

    @abstractmethod
    def _continued(self, prompts: list[Prompt], settings: SamplingParams, seeds: list[int]) -> list[str]: ...

    # --- what a kind asks ---------------------------------------------------------------------------------------------

    def _run(self, work: Any, *args: Any) -> Any:
        return self._open()._run(self, work, args)

    def _open(self) -> O:
        if self._backend is None:
            raise self._closed_error()
        return self._backend

    def _closed_error(self) -> ViewClosedError:
        return ViewClosedError(
            f"the view {self.id!r} was used after its `with` block. Keep what it returned, or open another view."
        )


def closed_error(backend: str) -> BackendClosedError:
    """Return the error for a backend that is used after it was closed."""
    return BackendClosedError(
        f"{backend} was used after it was closed, by eviction or at the end of the session."
        " Ask for it again with sway_backend(spec)."
    )


def null_id(seed: int, rank_scale: float) -> str:
    """Return the id of a view with noise in place of an adapter: dlm-sway's.

    Raises:
        ValueError: ``rank_scale`` is not positive and finite.
    """
    if rank_scale <= 0.0 or not math.isfinite(rank_scale):
        raise ValueError(f"rank_scale must be positive and finite; got {rank_scale!r}")
    return f"null_{seed}" if rank_scale == 1.0 else f"null_{seed}_rank{rank_scale:.2f}"
