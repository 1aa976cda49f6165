"""A view: scoring and generation in one state of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.scoring import generation, scores
from pytest_sway.backends.questions import Settings
from pytest_sway.backends.text import chat
from pytest_sway.errors import ViewClosedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_sway.backends.hf.backend import HFBackend
    from pytest_sway.backends.hf.scoring.engine import Engine
    from pytest_sway.protocols import Message, Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class HFView:
    """One side of a backend; made by `HFBackend.as_base` and its like.

    It refers to no weights itself, so a view that a test holds on to keeps nothing alive.

    Attributes:
        id: ``base``, ``ft``, ``scaled_<lam>`` or ``null_<seed>``.
    """

    def __init__(self, view_id: str, backend: HFBackend) -> None:
        self.id = view_id
        self._backend: HFBackend | None = backend

    def __repr__(self) -> str:
        return f"<HFView {self.id!r}{'' if self._backend else ', closed'}>"

    @property
    def model(self) -> Any:
        """A model of the test's own: the ``PeftModel``, or without an adapter the Hugging Face model.

        It is made when it is first asked for, and is the same for as long as the view is open. It shares the memory of
        the base and copies what is written to. So a test may do anything to it: hooks, training, merging, gradients.
        Nothing of that reaches a view's answers, another view's model or another test.
        """
        return self._open()._raw_model(self)

    @property
    def tokenizer(self) -> Any:
        """A tokenizer of the test's own, made when it is first asked for.

        Its settings are its own. Its vocabulary, normalizer, pre-tokenizer and post-processor are shared, and a test
        that changes those, as by adding tokens, gets a `MutationError`.
        """
        return self._open()._tokenizer(self)

    def render(self, messages: Iterable[Message]) -> str:
        """Return what the tokenizer's chat template makes of a conversation, up to where the answer begins.

        Wherever a prompt is asked for, the messages themselves will do. The template puts in all special tokens, so
        that none are added when a prompt of messages is tokenised.

        Args:
            messages: Mappings such as ``{"role": "user", "content": "Hello"}``, in order.

        Raises:
            ScoringError: The tokenizer has no chat template, a message is malformed, or the template refuses them.
        """
        return str(self._run(_render, messages))

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
        """Return `logprob_of` for each pair of a prompt and a completion, in their order.

        Many pairs go through the model together, and have what they begin with in common read once: in one row with
        it, or where the model's attention does not allow that, the completions of one prompt on its key-value cache.
        In float32 each answer is within 2e-4 nats per token of that for the pair alone; the same pairs, in the same
        order, give the same bits.
        """
        return scores.logprobs_of(self._run, pairs)

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
            ScoringError: A prefix is wanted, and the tokenizer has neither BOS nor EOS; or the model has no embedding
                for a token.
        """
        return self.rolling_logprobs([text], prefix=prefix)[0]

    def rolling_logprobs(self, texts: Iterable[str], *, prefix: bool = True) -> list[RollingLogprob]:
        """Return `rolling_logprob` for each text, in their order.

        Texts go through the model together, and have what they begin with in common read once. In float32 each
        log-probability is within 2e-4 nats of that for the text alone; the same texts, in the same order, give the
        same bits.
        """
        return scores.rolling_logprobs(self._run, texts, prefix=prefix)

    def next_token_dist(self, prompt: Prompt, *, top_k: int = 256) -> TokenDist:
        """Return the distribution of the token after ``prompt``, cut to the ``top_k`` most probable tokens.

        Raises:
            ScoringError: ``top_k`` is under 1, or nothing can stand for an empty prompt.
        """
        return self.next_token_dists([prompt], top_k=top_k)[0]

    def next_token_dists(self, prompts: Iterable[Prompt], *, top_k: int = 256) -> list[TokenDist]:
        """Return `next_token_dist` for each prompt, in their order; see `rolling_logprobs` on how exactly."""
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

        At temperature 0 each token is the most probable one of `next_token_dist`, but for ties. A key-value cache is
        used where a trial on a few tokens shows that it does not change that; else each token costs a pass over all of
        the text.

        It does what the arguments say and no more: of the base's own generation settings (a top-k, a repetition
        penalty, ...) only the tokens that end a text count. The global random state takes no part and stays as it is.

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

        Prompts of similar length go through the model together, padded on the left, where a trial shows that the model
        allows that.

        Args:
            prompts: What to continue.
            max_new_tokens: The most tokens to add to each.
            temperature: 0 for the most probable token each time; above, sampling.
            top_p: Sample from the smallest set of tokens with this mass.
            seed: Where sampling starts: one for all prompts, so that equal prompts get equal texts, or one for each.
        """
        settings = Settings(max_new_tokens, temperature, top_p)
        return generation.generate_many(self._run, prompts, settings, seed)

    def close(self) -> None:
        """Close the view; its backend stays open. Closing twice is harmless."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend._view_closed(self)

    def _run(self, work: Any, *args: Any) -> Any:
        return self._open()._run(self, work, args)

    def _open(self) -> HFBackend:
        if self._backend is None:
            raise self._closed_error()
        return self._backend

    def _closed_error(self) -> ViewClosedError:
        return ViewClosedError(
            f"the view {self.id!r} was used after its `with` block. Keep what it returned, or open another view."
        )


def _render(engine: Engine, messages: Iterable[Message]) -> str:
    return chat.render(engine.tokenizer, messages)
