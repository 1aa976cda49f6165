"""`BaseView`: the questions that a test can ask of one side of a backend.

It checks arguments, and answers a single question as a batch of one. Each kind answers batches in its own way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pytest_sway.backends.questions import (
    SamplingParams,
    checked_pair,
    checked_text,
    checked_top_k,
    listed,
    refuse_unknown,
    seeds,
    whole,
)
from pytest_sway.backends.text.heads import QuestionsOfHeads
from pytest_sway.errors import BackendClosedError, ViewClosedError
from pytest_sway.protocols import NEW_TOKENS, Chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Never, Self

    from pytest_sway.protocols import Message, Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True


class ViewOwner(Protocol):
    """What a view needs of its backend. Its text is the label of its spec."""

    def _run(self, view: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return ``work(engine, *args)``, with the engine that computes the view's answers."""
        ...

    def _view_closed(self, view: Any) -> None:
        """Release what is kept for the view."""
        ...


O = TypeVar("O", bound=ViewOwner)  # noqa: E741 # a type, not a number


class BaseView(QuestionsOfHeads, ABC, Generic[O]):
    """One side of a backend, open for the length of a ``with`` block.

    It holds no weights, so a test may keep it without keeping the model in memory.

    Attributes:
        id: ``base``, ``ft``, ``scaled_<lam>`` or ``null_<seed>``.
        label: Its id and the label of its backend's spec.
        task: The task of its model, which decides what it answers.
    """

    def __init__(self, view_id: str, backend: O) -> None:
        self.id = view_id
        self.label = f"{view_id} of {backend}"
        self._backend: O | None = backend

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r}{'' if self._backend else ', closed'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(self, messages: Iterable[Message] | Chat, **template_args: Any) -> str:
        """Return a conversation as the tokenizer's chat template renders it, up to where the answer begins.

        You can pass the messages themselves wherever a prompt is expected, and `Chat(messages, ...)` where the template
        takes arguments. The template writes all special tokens, so none are added when such a prompt is tokenised.

        Args:
            messages: Mappings such as ``{"role": "user", "content": "Hello"}``, in order.
            template_args: What ``tokenizer.apply_chat_template`` and the template take: ``tools``, ``documents``,
                ``enable_thinking``, ``continue_final_message``, ...

        Raises:
            ScoringError: There is no chat template, a message is malformed, or the template refuses the messages or
                does not read an argument.
        """
        self._open()
        if template_args:
            given = messages if isinstance(messages, Chat) else Chat(messages)
            messages = Chat(given.messages, **{**given.template_args, **template_args})
        return self._rendered(messages)

    def logprob_of(self, prompt: Prompt, completion: str) -> float:
        """Return the sum of the log-probabilities of the completion's tokens given the prompt, in nats.

        The pair is tokenised as lm-evaluation-harness does: trailing whitespace of the prompt goes to the completion,
        and BOS (else EOS) stands in for an empty prompt. If the model cannot read it all at once, tokens are cut from
        the left, with a `SwayWarning`.

        Raises:
            ScoringError: The completion has no tokens, or more than the model reads at once; or the model has no
                embedding for a token.
        """
        return self.logprobs_of([(prompt, completion)])[0]

    def logprobs_of(self, pairs: Iterable[tuple[Prompt, str]]) -> list[float]:
        """Return `logprob_of` for each pair of a prompt and a completion, in their order."""
        self._open()
        asked = [checked_pair(pair) for pair in listed(pairs, "pairs of a prompt and a completion")]
        return self._logprobs([(whole(prompt), whole(completion)) for prompt, completion in asked])

    def rolling_logprob(self, text: str, *, prefix: bool = True) -> RollingLogprob:
        """Return the log-probability of each token of ``text`` given those before it, in nats.

        A text longer than the model reads at once is cut into windows as lm-evaluation-harness's
        ``loglikelihood_rolling`` does.

        Args:
            text: The text.
            prefix: Begin with BOS (else EOS) and score all of the text's own tokens, as lm-evaluation-harness does. The
                ``token_ids`` begin with that token, too. A tokenizer that adds BOS by default adds no second one,
                unlike there. With ``False``, the tokens are the tokenizer's default ones, and the first is not scored,
                as in dlm-sway.

        Raises:
            ScoringError: ``prefix`` is true and there is neither BOS nor EOS, or the model has no embedding for a
                token.
        """
        return self.rolling_logprobs([text], prefix=prefix)[0]

    def rolling_logprobs(self, texts: Iterable[str], *, prefix: bool = True) -> list[RollingLogprob]:
        """Return `rolling_logprob` for each text, in their order."""
        self._open()
        return self._rolling([whole(checked_text(text)) for text in listed(texts, "texts")], prefix)

    def next_token_dist(self, prompt: Prompt, *, top_k: int = 256) -> TokenDist:
        """Return the distribution of the token after ``prompt``, cut to the ``top_k`` most probable tokens.

        Raises:
            ScoringError: ``top_k`` is below 1, or the prompt is empty and there is neither BOS nor EOS.
        """
        return self.next_token_dists([prompt], top_k=top_k)[0]

    def next_token_dists(self, prompts: Iterable[Prompt], *, top_k: int = 256) -> list[TokenDist]:
        """Return `next_token_dist` for each prompt, in their order."""
        self._open()
        most = checked_top_k(top_k)
        return self._dists([whole(prompt) for prompt in listed(prompts, "prompts")], most)

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
        **unknown: Never,
    ) -> str:
        """Continue ``prompt`` and return the new text, without special tokens.

        At temperature 0, each token is the most probable one of `next_token_dist`, except for ties. Of the base's own
        generation settings (top-k, repetition penalty, ...) only the tokens that end a text are used; the tokenizer's
        EOS ends it, too. The global random state is neither used nor changed.

        The arguments mean what they mean in transformers, and follow each other as there: the repetition penalty, the
        temperature, ``top_k``, ``top_p``, ``min_p``.

        Args:
            prompt: What to continue.
            max_new_tokens: The most tokens to add; fewer where the model ends its text, or at a ``stop`` text.
            temperature: 0 takes the most probable token each time; above 0, tokens are sampled.
            top_p: Sample from the smallest set of tokens with this mass.
            seed: The seed for sampling. Equal seeds give equal texts, on other devices too, except for rounding.
            stop: One text, or several. The new text ends before the first one in it. The text of a special token, such
                as ``<|im_end|>``, counts too.
            top_k: Sample from this many of the most probable tokens; 0 for all.
            min_p: Sample from the tokens at least this times as probable as the most probable one; 0 for all.
            repetition_penalty: Over 1, tokens of the prompt and of the new text become less probable; 1 for none.
            unknown: Refused, with the keywords that there are.

        Raises:
            ScoringError: An argument is invalid, or leaves no room for a prompt.
            TypeError: There is no such keyword.
        """
        refuse_unknown(self.generate, unknown)
        return self.generate_many(
            [prompt],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )[0]

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
        **unknown: Never,
    ) -> list[str]:
        """Return `generate` for each prompt, in their order. Each gets the text that it gets alone, except for ties.

        Args:
            prompts: What to continue.
            max_new_tokens: The most tokens to add to each.
            temperature: 0 takes the most probable token each time; above 0, tokens are sampled.
            top_p: Sample from the smallest set of tokens with this mass.
            seed: The seed for sampling: one for all prompts, so that equal prompts get equal texts, or one for each.
            stop: One text, or several, that end each new text.
            top_k: Sample from this many of the most probable tokens; 0 for all.
            min_p: Sample from the tokens at least this times as probable as the most probable one; 0 for all.
            repetition_penalty: Over 1, tokens of a prompt and of its new text become less probable; 1 for none.
            unknown: Refused, with the keywords that there are.
        """
        refuse_unknown(self.generate_many, unknown)
        self._open()
        settings = SamplingParams.of(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        asked = [whole(prompt) for prompt in listed(prompts, "prompts")]
        return self._continued(asked, settings, seeds(seed, len(asked)))

    def close(self) -> None:
        """Close the view; its backend stays open. Closing twice is harmless."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend._view_closed(self)

    # --- implemented by each kind: the arguments are checked, and the view is open ------------------------------------

    @abstractmethod
    def _rendered(self, messages: Iterable[Message] | Chat) -> str: ...

    @abstractmethod
    def _logprobs(self, pairs: list[tuple[Prompt, str]]) -> list[float]: ...

    @abstractmethod
    def _rolling(self, texts: list[str], prefix: bool) -> list[RollingLogprob]: ...

    @abstractmethod
    def _dists(self, prompts: list[Prompt], top_k: int) -> list[TokenDist]: ...

    @abstractmethod
    def _continued(self, prompts: list[Prompt], settings: SamplingParams, seeds: list[int]) -> list[str]: ...

    # --- used by each kind --------------------------------------------------------------------------------------------

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
    """Return the error for the use of a closed backend."""
    return BackendClosedError(
        f"{backend} was used after it was closed, by eviction or at the end of the session."
        " Ask for it again with sway_backend(spec)."
    )


def null_id(seed: int, rank_scale: float) -> str:
    """Return the id of a view with noise in place of an adapter, as dlm-sway writes it.

    Raises:
        ValueError: ``rank_scale`` is not positive and finite.
    """
    if rank_scale <= 0.0 or not math.isfinite(rank_scale):
        raise ValueError(f"rank_scale must be positive and finite; got {rank_scale!r}")
    return f"null_{seed}" if rank_scale == 1.0 else f"null_{seed}_rank{rank_scale:.2f}"
