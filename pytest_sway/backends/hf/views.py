"""A view: scoring and generation in one state of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf import scores
from pytest_sway.errors import ViewClosedError

if TYPE_CHECKING:
    from pytest_sway.backends.hf.backend import HFBackend
    from pytest_sway.scoring import RollingLogprob, TokenDist

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
        """The raw model, put into this view's state: the ``PeftModel``, or without an adapter the Hugging Face model.

        It stays in this state until another view's ``model`` is asked for; scoring through views does not change it.
        """
        return self._open()._raw_model(self)

    @property
    def tokenizer(self) -> Any:
        """The raw tokenizer. It is shared: change nothing of it."""
        return self._open()._tokenizer(self)

    def logprob_of(self, prompt: str, completion: str) -> float:
        """Return the sum of the log-probabilities of the completion's tokens given the prompt, in nats.

        The pair is tokenised as lm-evaluation-harness does.

        Raises:
            ScoringError: The completion has no tokens.
        """
        logprob: float = self._run(scores.logprob_of, prompt, completion)
        return logprob

    def rolling_logprob(self, text: str) -> RollingLogprob:
        """Return the log-probability of each token of ``text`` given those before it, in nats."""
        rolling: RollingLogprob = self._run(scores.rolling_logprob, text)
        return rolling

    def next_token_dist(self, prompt: str, *, top_k: int = 256) -> TokenDist:
        """Return the distribution of the token after ``prompt``, cut to the ``top_k`` most probable tokens.

        Raises:
            ScoringError: ``top_k`` is under 1, or nothing can stand for an empty prompt.
        """
        dist: TokenDist = self._run(scores.next_token_dist, prompt, top_k)
        return dist

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continue ``prompt`` and return the new text; the global random state is left alone.

        Args:
            prompt: What to continue.
            max_new_tokens: The most tokens to add.
            temperature: 0 for the most probable token each time; above, sampling.
            top_p: Sample from the smallest set of tokens with this mass.
            seed: Where sampling starts.
        """

        def work(model: Any, tokenizer: Any, _argument: str | None) -> str:
            return scores.generate(
                model,
                tokenizer,
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )

        return str(self._run(work))

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
