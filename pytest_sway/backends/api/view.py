"""A view: what a test asks of one of the two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_sway.backends.api import scoring
from pytest_sway.backends.api.event_loop import in_order
from pytest_sway.backends.questions import Settings, checked_pair, checked_text, listed, seeds
from pytest_sway.errors import ViewClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from pytest_sway.backends.api.backend import ApiBackend
    from pytest_sway.backends.api.served_model import ServedModel
    from pytest_sway.protocols import Message, Prompt, RollingLogprob, TokenDist

T = TypeVar("T")

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class ApiView:
    """One side of a backend; made by `ApiBackend.as_base` and `ApiBackend.as_finetuned`.

    The calls for many at once send several requests at a time; the first error cancels the rest. Prompts are texts:
    those of messages are refused, as in `render`.

    Attributes:
        id: ``base`` or ``ft``.
    """

    def __init__(self, view_id: str, backend: ApiBackend, model: ServedModel) -> None:
        self.id = view_id
        self._backend: ApiBackend | None = backend
        self._model = model

    def __repr__(self) -> str:
        return f"<ApiView {self.id!r} of {self._model}{'' if self._backend else ', closed'}>"

    def render(self, messages: Iterable[Message]) -> str:  # noqa: ARG002 # the signature is that of other views
        """Refuse: a server applies its chat template out of sight.

        Raises:
            ScoringError: Always.
        """
        raise scoring.no_template(self._model)

    def logprob_of(self, prompt: Prompt, completion: str) -> float:
        """Return the sum of the log-probabilities of the completion's tokens given the prompt, in nats.

        The pair is tokenised as lm-evaluation-harness does.

        Raises:
            ScoringError: The completion has no tokens, or the server cannot score texts.
            ServerError: The server failed.
        """
        return self.logprobs_of([(prompt, completion)])[0]

    def logprobs_of(self, pairs: Iterable[tuple[Prompt, str]]) -> list[float]:
        """Return `logprob_of` for each pair of a prompt and a completion, in their order."""
        asked = [checked_pair(pair) for pair in listed(pairs, "pairs of a prompt and a completion")]
        return self._each(asked, lambda model, pair: scoring.logprob_of(model, *pair))

    def rolling_logprob(self, text: str, *, prefix: bool = True) -> RollingLogprob:
        """Return the log-probability of each token of ``text`` given those before it, in nats.

        Args:
            text: The text.
            prefix: Score also the text's first token, behind the BOS that the server puts in front and shows, as vLLM
                does for models with a BOS; ``token_ids`` begin with it. Without, take the text as the server tokenises
                it: where it shows no BOS, the first token is not scored.

        Raises:
            ScoringError: A prefix is wanted and the server shows no BOS, or the server cannot score texts.
            ServerError: The server failed.
        """
        return self.rolling_logprobs([text], prefix=prefix)[0]

    def rolling_logprobs(self, texts: Iterable[str], *, prefix: bool = True) -> list[RollingLogprob]:
        """Return `rolling_logprob` for each text, in their order."""
        asked = [checked_text(text) for text in listed(texts, "texts")]
        return self._each(asked, lambda model, text: scoring.rolling_logprob(model, text, prefix=prefix))

    def next_token_dist(self, prompt: Prompt, *, top_k: int = 256) -> TokenDist:
        """Return the distribution of the token after ``prompt``, cut to the ``top_k`` most probable tokens.

        Most servers give fewer (vLLM 20 unless told otherwise, OpenAI 5): then all that they give are returned, and the
        rest of the mass is in ``tail_logprob``. Servers that give no ids get a number of ours for each token, a
        negative one, which is the same for every model; ``vocab_size`` is 0 where the server does not tell it.

        Raises:
            ScoringError: ``top_k`` is under 1, or the server gives no distribution.
            ServerError: The server failed.
        """
        return self.next_token_dists([prompt], top_k=top_k)[0]

    def next_token_dists(self, prompts: Iterable[Prompt], *, top_k: int = 256) -> list[TokenDist]:
        """Return `next_token_dist` for each prompt, in their order."""
        asked = listed(prompts, "prompts")
        return self._each(asked, lambda model, prompt: scoring.next_token_dist(model, prompt, top_k=top_k))

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continue ``prompt`` and return the new text.

        Args:
            prompt: What to continue.
            max_new_tokens: The most tokens to add.
            temperature: 0 for the most probable token each time; above, sampling, in which a server may have settings
                of its own besides.
            top_p: Sample from the smallest set of tokens with this mass.
            seed: Where sampling starts, if the server heeds it.

        Raises:
            ScoringError: An argument has no meaning.
            ServerError: The server failed.
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
        """Return `generate` for each prompt, in their order; ``seed`` is one for all, or one for each."""
        Settings(max_new_tokens, temperature, top_p).check()
        asked_prompts = listed(prompts, "prompts")
        starts = seeds(seed, len(asked_prompts))

        def work(model: ServedModel, asked: tuple[Prompt, int]) -> Coroutine[Any, Any, str]:
            prompt, start = asked
            return scoring.generate(
                model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=start
            )

        return self._each(list(zip(asked_prompts, starts, strict=True)), work)

    def close(self) -> None:
        """Close the view; its backend stays open. Closing twice is harmless."""
        self._backend = None

    def _each(self, asked: Sequence[Any], work: Callable[[ServedModel, Any], Coroutine[Any, Any, T]]) -> list[T]:
        if self._backend is None:
            raise ViewClosedError(
                f"the view {self.id!r} was used after its `with` block. Keep what it returned, or open another view."
            )
        return self._backend._run(in_order(work(self._model, item) for item in asked))
