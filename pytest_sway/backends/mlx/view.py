"""A view: scoring and generation with one side of a backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.mlx import scores
from pytest_sway.backends.questions import Settings
from pytest_sway.backends.text import chat
from pytest_sway.errors import ViewClosedError

if TYPE_CHECKING:
    from pytest_sway.backends.mlx.backend import MLXBackend
    from pytest_sway.backends.mlx.model.engine import Engine
    from pytest_sway.protocols import Message, Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class MLXView:
    """One side of a backend; made by `MLXBackend.as_base` and its like. It answers as a view of kind ``hf`` does.

    It refers to no weights itself, so a view that a test holds on to keeps nothing alive.

    Attributes:
        id: ``base``, ``ft``, ``scaled_<lam>`` or ``null_<seed>``.
    """

    def __init__(self, view_id: str, backend: MLXBackend) -> None:
        self.id = view_id
        self._backend: MLXBackend | None = backend

    def __repr__(self) -> str:
        return f"<MLXView {self.id!r}{'' if self._backend else ', closed'}>"

    @property
    def model(self) -> Any:
        """The test's own model of mlx-lm, with exactly this view's adapter, or none.

        It is made when it is first asked for, and is the same object for as long as the view is open. What you do to it
        through MLX (train it, write to its arrays, quantize it, replace layers) is done to this model alone, and ends
        with the test: this view and all others go on scoring with the models that their specs name.

        Its weights share their memory with theirs. What goes around MLX reaches that memory, such as a write to
        ``np.array(weight, copy=False)``; the test that does it gets a `MutationError`.
        """
        return self._open()._own_model(self)

    @property
    def tokenizer(self) -> Any:
        """The test's own wrapper of mlx-lm around the tokenizer, the same object for as long as the view is open.

        Its settings are its own. What lives in Rust is shared, such as added tokens and the normalizer: a test that
        changes these gets a `MutationError`.
        """
        return self._open()._own_tokenizer(self)

    def render(self, messages: Iterable[Message]) -> str:
        """Return what the tokenizer's chat template makes of a conversation, up to where the answer begins.

        Raises:
            ScoringError: The tokenizer has no chat template, a message is malformed, or the template refuses them.
        """
        return str(self._run(_render, messages))

    def logprob_of(self, prompt: Prompt, completion: str) -> float:
        """Return the sum of the log-probabilities of the completion's tokens given the prompt, in nats.

        The pair is tokenised as lm-evaluation-harness does. What the model cannot read at once is cut from the left,
        with a `SwayWarning`.

        Raises:
            ScoringError: The completion has no tokens, or more than the model reads at once.
        """
        return self.logprobs_of([(prompt, completion)])[0]

    def logprobs_of(self, pairs: Iterable[tuple[Prompt, str]]) -> list[float]:
        """Return `logprob_of` for each pair of a prompt and a completion, in their order, one after the other."""
        return scores.logprobs_of(self._run, pairs)

    def rolling_logprob(self, text: str, *, prefix: bool = True) -> RollingLogprob:
        """Return the log-probability of each token of ``text`` given those before it, in nats.

        Args:
            text: The text; one longer than the model reads at once is cut into windows as lm-evaluation-harness does.
            prefix: Put the token that begins a text (BOS, else EOS) before it and score all of the text's own tokens,
                as lm-evaluation-harness does. With ``False``, the tokens are those that the tokenizer gives of its
                own accord, and the first is not scored, as in dlm-sway.

        Raises:
            ScoringError: A prefix is wanted, and the tokenizer has neither BOS nor EOS.
        """
        return self.rolling_logprobs([text], prefix=prefix)[0]

    def rolling_logprobs(self, texts: Iterable[str], *, prefix: bool = True) -> list[RollingLogprob]:
        """Return `rolling_logprob` for each text, in their order, one after the other."""
        return scores.rolling_logprobs(self._run, texts, prefix=prefix)

    def next_token_dist(self, prompt: Prompt, *, top_k: int = 256) -> TokenDist:
        """Return the distribution of the token after ``prompt``, cut to the ``top_k`` most probable tokens.

        Raises:
            ScoringError: ``top_k`` is under 1, or nothing can stand for an empty prompt.
        """
        return self.next_token_dists([prompt], top_k=top_k)[0]

    def next_token_dists(self, prompts: Iterable[Prompt], *, top_k: int = 256) -> list[TokenDist]:
        """Return `next_token_dist` for each prompt, in their order, one after the other."""
        return scores.next_token_dists(self._run, prompts, top_k)

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

        MLX's random state takes no part and stays as it is. What is sampled is not what kind ``hf`` samples from the
        same seed.

        Args:
            prompt: What to continue.
            max_new_tokens: The most tokens to add; fewer where the model ends its text.
            temperature: 0 for the most probable token each time; above, sampling.
            top_p: Sample from the smallest set of tokens with this mass.
            seed: Where sampling starts.

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
        """Return `generate` for each prompt, in their order, one after the other.

        Args:
            prompts: What to continue.
            max_new_tokens: The most tokens to add to each.
            temperature: 0 for the most probable token each time; above, sampling.
            top_p: Sample from the smallest set of tokens with this mass.
            seed: Where sampling starts: one for all prompts, so that equal prompts get equal texts, or one for each.
        """
        settings = Settings(max_new_tokens, temperature, top_p)
        return scores.generate_many(self._run, prompts, settings, seed)

    def close(self) -> None:
        """Close the view; its backend stays open. Closing twice is harmless."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend._view_closed(self)

    def _run(self, work: Any, *args: Any) -> Any:
        return self._open()._run(self, work, args)

    def _open(self) -> MLXBackend:
        if self._backend is None:
            raise self._closed_error()
        return self._backend

    def _closed_error(self) -> ViewClosedError:
        return ViewClosedError(
            f"the view {self.id!r} was used after its `with` block. Keep what it returned, or open another view."
        )


def _render(engine: Engine, messages: Iterable[Message]) -> str:
    return chat.render(engine.tokenizer, messages)
