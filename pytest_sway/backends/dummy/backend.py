"""Backends of kind ``dummy``: canned answers and no model, to test one's own test code with.

A table that is given is complete: what is asked and not in it is an error. For a table that is left out, answers are
made up: the same in every process, and more probable on the fine-tuned side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.dummy.canned import Between, Canned, Noisy, Side
from pytest_sway.backends.questions import Settings, checked_messages, checked_pair, checked_text, listed, seeds
from pytest_sway.errors import BackendClosedError, ScoringError, ViewClosedError
from pytest_sway.protocols import Message, Prompt, RollingLogprob, TokenDist
from pytest_sway.spec.answers import SIDES, canonical, read_answers, tail

if TYPE_CHECKING:
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class DummyBackend:
    """Canned answers as a differential backend, with views like those of a real one.

    Args:
        answers: By side, ``base`` and ``finetuned``; see `pytest_sway.spec.answers`. Made up where there are none.
        name: What it is called in errors.

    Raises:
        SpecError: The answers are malformed.
    """

    safe_for_concurrent_views = True

    def __init__(self, answers: Mapping[str, Any] | str | None = None, *, name: str = "dummy") -> None:
        self._text = canonical(answers or {})
        self._name = name
        tables = json.loads(self._text)
        self._base, self._tuned = (Canned(side, tables.get(side, {})) for side in SIDES)
        self._closed = False

    def __repr__(self) -> str:
        return f"<DummyBackend {self._name}{', closed' if self._closed else ''}>"

    @contextmanager
    def as_base(self) -> Iterator[DummyView]:
        """Open a view on the base's answers."""
        with self._view("base", self._base) as view:
            yield view

    @contextmanager
    def as_finetuned(self) -> Iterator[DummyView]:
        """Open a view on the fine-tuned model's answers; there are some whether or not the spec has an adapter."""
        with self._view("ft", self._tuned) as view:
            yield view

    @contextmanager
    def as_scaled_adapter(self, lam: float) -> Iterator[DummyView]:
        """Open a view on answers between the base's (0) and the fine-tuned model's (1); texts are the nearer side's."""
        with self._view(f"scaled_{lam:.2f}", Between(self._base, self._tuned, lam)) as view:
            yield view

    @contextmanager
    def as_null_adapter(self, seed: int, *, init_scale: float = 0.02, rank_scale: float = 1.0) -> Iterator[DummyView]:
        """Open a view on the base's answers with noise on each number, from ``N(0, init_scale**2 * rank_scale)``.

        Raises:
            ValueError: ``rank_scale`` is not positive and finite.
        """
        if rank_scale <= 0.0 or not math.isfinite(rank_scale):
            raise ValueError(f"rank_scale must be positive and finite; got {rank_scale!r}")
        view_id = f"null_{seed}" if rank_scale == 1.0 else f"null_{seed}_rank{rank_scale:.2f}"
        with self._view(view_id, Noisy(self._base, seed, init_scale * math.sqrt(rank_scale))) as view:
            yield view

    def preflight_finite_check(self) -> tuple[bool, str]:
        """Return ``(True, "")``, or ``(False, reason)`` where a canned number is NaN or infinite."""
        self._require()
        bad = [side.name for side in (self._base, self._tuned) if not side.finite]
        return not bad, "; ".join(f"the {name} side has canned answers that are not finite" for name in bad)

    def cache_identity(self) -> str:
        """Return what is equal for equal answers."""
        return f"dummy:{self._name}:{hashlib.sha256(self._text.encode()).hexdigest()}"

    def sizes(self) -> Mapping[Any, int]:
        """Return the bytes of its weights: it has none."""
        return {}

    def close(self) -> None:
        """Close it, so that its views say so. Closing twice is harmless."""
        self._closed = True

    @contextmanager
    def _view(self, view_id: str, side: Side) -> Iterator[DummyView]:
        self._require()
        view = DummyView(view_id, self, side)
        try:
            yield view
        finally:
            view.close()

    def _require(self) -> None:
        if self._closed:
            raise BackendClosedError(
                f"the dummy backend {self._name!r} was used after it was closed, by eviction or at the end of the"
                " session. Ask for it again with sway_backend(spec)."
            )


class DummyView:
    """One side of a `DummyBackend`, or something between or beside them.

    Attributes:
        id: ``base``, ``ft``, ``scaled_<lam>`` or ``null_<seed>``.
    """

    def __init__(self, view_id: str, backend: DummyBackend, side: Side) -> None:
        self.id = view_id
        self._backend = backend
        self._answers = side
        self._closed = False

    def __repr__(self) -> str:
        return f"<DummyView {self.id!r}{', closed' if self._closed else ''}>"

    def render(self, messages: Iterable[Message]) -> str:
        """Return ``role: content`` in a line for each message, and ``assistant:``; answers are canned for this text.

        A last message of the assistant's is continued: nothing comes after it.

        Raises:
            ScoringError: A message is malformed.
        """
        self._side()
        conversation, continues = checked_messages(messages)
        lines = [f"{message['role']}: {message['content']}" for message in conversation]
        return "\n".join(lines if continues else [*lines, "assistant:"])

    def logprob_of(self, prompt: Prompt, completion: str) -> float:
        """Return the log-probability of the completion given the prompt, in nats.

        Raises:
            ScoringError: The completion is empty.
            BackendUseError: Answers are canned, and this one is not there; so in all that follows.
        """
        if not completion:
            raise ScoringError(f"the completion is empty after the prompt {prompt!r}; there is nothing to score.")
        return self._side().logprob(self._text(prompt), completion)

    def logprobs_of(self, pairs: Iterable[tuple[Prompt, str]]) -> list[float]:
        """Return `logprob_of` for each pair of a prompt and a completion."""
        asked = [checked_pair(pair) for pair in listed(pairs, "pairs of a prompt and a completion")]
        return [self.logprob_of(prompt, completion) for prompt, completion in asked]

    def rolling_logprob(self, text: str, *, prefix: bool = True) -> RollingLogprob:
        """Return the canned log-probabilities of the tokens of ``text``, in nats.

        Args:
            text: The text.
            prefix: Where they are made up, a token is a word; score also the first one, behind a token 0.
        """
        import numpy as np

        ids, logprobs = self._side().rolling(checked_text(text), prefix)
        scored = np.array(logprobs, dtype=np.float32)
        return RollingLogprob(np.array(ids, dtype=np.int64), scored, len(ids), float(sum(logprobs)))

    def rolling_logprobs(self, texts: Iterable[str], *, prefix: bool = True) -> list[RollingLogprob]:
        """Return `rolling_logprob` for each text."""
        return [self.rolling_logprob(text, prefix=prefix) for text in listed(texts, "texts")]

    def next_token_dist(self, prompt: Prompt, *, top_k: int = 256) -> TokenDist:
        """Return the distribution of the token after ``prompt``, cut to at most ``top_k`` tokens.

        Raises:
            ScoringError: ``top_k`` is under 1.
        """
        import numpy as np

        if top_k < 1:
            raise ScoringError(f"top_k must be at least 1, not {top_k}.")
        dist = self._side().dist(self._text(prompt))
        left = dist.tail_logprob if top_k >= len(dist.logprobs) else tail(dist.logprobs[:top_k], dist.vocab_size)
        ids, logprobs = np.array(dist.token_ids[:top_k]), np.array(dist.logprobs[:top_k])
        return TokenDist(ids.astype(np.int64), logprobs.astype(np.float32), dist.vocab_size, left)

    def next_token_dists(self, prompts: Iterable[Prompt], *, top_k: int = 256) -> list[TokenDist]:
        """Return `next_token_dist` for each prompt."""
        return [self.next_token_dist(prompt, top_k=top_k) for prompt in listed(prompts, "prompts")]

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,  # noqa: ARG002 # a canned answer is the same at any temperature, from any seed
    ) -> str:
        """Return the canned continuation of ``prompt``, whole; one that is made up has ``max_new_tokens`` words.

        Raises:
            ScoringError: An argument has no meaning.
        """
        Settings(max_new_tokens, temperature, top_p).check()
        return self._side().generation(self._text(prompt), max_new_tokens)

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> list[str]:
        """Return `generate` for each prompt; ``seed`` is one for all, or one for each."""
        asked = listed(prompts, "prompts")
        seeds(seed, len(asked))
        return [
            self.generate(prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
            for prompt in asked
        ]

    def close(self) -> None:
        """Close the view; its backend stays open. Closing twice is harmless."""
        self._closed = True

    def _text(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self.render(prompt)

    def _side(self) -> Side:
        if self._closed:
            raise ViewClosedError(
                f"the view {self.id!r} was used after its `with` block. Keep what it returned, or open another view."
            )
        self._backend._require()
        return self._answers


def build_dummy(spec: ModelSpec) -> DummyBackend:
    """Build the dummy backend of a spec.

    Raises:
        SpecError: Its file of answers cannot be read, or is malformed.
    """
    answers = spec.answers
    return DummyBackend(read_answers(answers) if isinstance(answers, Path) else answers, name=spec.base)
