"""Backends of kind ``dummy``: canned answers instead of a model, to test your own test code with.

A table that you give is complete: a question that it lacks raises an error. For a table that you omit, answers are made
up: the same in every process, and more probable on the fine-tuned side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.checkpoints.plan import Plan
from pytest_sway.backends.contract import Build, HintsAtViews, opens_view
from pytest_sway.backends.dummy.canned import Between, Canned, Noisy, Side
from pytest_sway.backends.questions import SamplingParams, checked_messages, until
from pytest_sway.backends.view import BaseView, closed_error, null_id
from pytest_sway.errors import ScoringError
from pytest_sway.protocols import Chat, Message, Prompt, RollingLogprob, TokenDist
from pytest_sway.spec.answers import SIDES, canonical, read_answers, tail

if TYPE_CHECKING:
    from pytest_sway.backends.dummy.canned import Dist, Rolling
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


class DummyBackend(HintsAtViews):
    """A differential backend of canned answers, with views like those of a real one.

    Args:
        answers: By side, ``base`` and ``finetuned``; see `pytest_sway.spec.answers`. Missing tables are made up.
        name: Its name in errors.

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

    def __str__(self) -> str:
        return f"dummy:{self._name}"

    @opens_view
    def as_base(self) -> Iterator[DummyView]:
        """Open a view on the base's answers."""
        with self._view("base", self._base) as view:
            yield view

    @opens_view
    def as_finetuned(self) -> Iterator[DummyView]:
        """Open a view on the fine-tuned side's answers; there are some even if the spec has no adapter."""
        with self._view("ft", self._tuned) as view:
            yield view

    @opens_view
    def as_scaled_adapter(self, lam: float) -> Iterator[DummyView]:
        """Open a view on answers between the base's (0) and the fine-tuned side's (1); texts are the nearer side's."""
        with self._view(f"scaled_{lam:.2f}", Between(self._base, self._tuned, lam)) as view:
            yield view

    @opens_view
    def as_null_adapter(self, seed: int, *, init_scale: float = 0.02, rank_scale: float = 1.0) -> Iterator[DummyView]:
        """Open a view on the base's answers with noise on each number, from ``N(0, init_scale**2 * rank_scale)``.

        Raises:
            ValueError: ``rank_scale`` is not positive and finite.
        """
        with self._view(null_id(seed, rank_scale), Noisy(self._base, seed, init_scale * math.sqrt(rank_scale))) as view:
            yield view

    def preflight_finite_check(self) -> tuple[bool, str]:
        """Return ``(True, "")``, or ``(False, reason)`` where a canned number is NaN or infinite."""
        self._require()
        bad = [side.name for side in (self._base, self._tuned) if not side.finite]
        return not bad, "; ".join(f"the {name} side has canned answers that are not finite" for name in bad)

    def cache_identity(self) -> str:
        """Return a text that is equal for equal names and answers."""
        return f"dummy:{self._name}:{hashlib.sha256(self._text.encode()).hexdigest()}"

    def sizes(self) -> Mapping[Any, int]:
        """Return the bytes of the weights: a dummy has none."""
        return {}

    def close(self) -> None:
        """Close the backend and its views. Closing twice is harmless."""
        self._closed = True

    @contextmanager
    def _view(self, view_id: str, side: Side) -> Iterator[DummyView]:
        self._require()
        with DummyView(view_id, self, side) as view:
            yield view

    def _run(self, view: DummyView, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._require()
        return work(view.side, *args)

    def _view_closed(self, view: DummyView) -> None:
        """Nothing is kept for a view."""

    def _require(self) -> None:
        if self._closed:
            raise closed_error(f"the dummy backend {self._name!r}")


class DummyView(BaseView["DummyBackend"]):
    """One side of a `DummyBackend`, or something between or beside them.

    A missing canned answer raises `BackendUseError`. In made-up answers, a token is a word, and token 0 begins a text.
    A canned continuation comes whole, at any temperature and from any seed; a made-up one has ``max_new_tokens`` words.
    Both end before the first ``stop`` text.
    """

    def __init__(self, view_id: str, backend: DummyBackend, side: Side) -> None:
        super().__init__(view_id, backend)
        self.side = side

    def _rendered(self, messages: Iterable[Message] | Chat) -> str:
        return str(self._run(lambda _: _text(messages)))

    def _logprobs(self, pairs: list[tuple[Prompt, str]]) -> list[float]:
        for prompt, completion in pairs:
            if not completion:
                raise ScoringError(f"the completion is empty after the prompt {prompt!r}; there is nothing to score.")
        return self._each(pairs, lambda side, pair: side.logprob(_text(pair[0]), pair[1]))

    def _rolling(self, texts: list[str], prefix: bool) -> list[RollingLogprob]:
        return self._each(texts, lambda side, text: _rolling(side.rolling(text, prefix)))

    def _dists(self, prompts: list[Prompt], top_k: int) -> list[TokenDist]:
        return self._each(prompts, lambda side, prompt: _cut(side.dist(_text(prompt)), top_k))

    def _continued(self, prompts: list[Prompt], settings: SamplingParams, seeds: list[int]) -> list[str]:  # noqa: ARG002
        words = settings.max_new_tokens
        return self._each(prompts, lambda side, prompt: until(side.generation(_text(prompt), words), settings.stop))

    def _each(self, asked: Iterable[Any], answer: Callable[[Side, Any], Any]) -> list[Any]:
        return list(self._run(lambda side: [answer(side, one) for one in asked]))


def _text(prompt: Any) -> str:
    """Return a prompt's text: ``role: content`` for each message, and ``assistant:`` where that turn begins.

    Further arguments for a chat template change nothing.
    """
    if isinstance(prompt, str):
        return prompt
    conversation = checked_messages(prompt)
    lines = [f"{message['role']}: {message.get('content')}" for message in conversation.messages]
    return "\n".join([*lines, "assistant:"] if conversation.opens else lines)


def _rolling(found: Rolling) -> RollingLogprob:
    import numpy as np

    ids, logprobs = found
    scored = np.array(logprobs, dtype=np.float32)
    return RollingLogprob(np.array(ids, dtype=np.int64), scored, len(ids), float(sum(logprobs)))


def _cut(dist: Dist, top_k: int) -> TokenDist:
    import numpy as np

    left = dist.tail_logprob if top_k >= len(dist.logprobs) else tail(dist.logprobs[:top_k], dist.vocab_size)
    ids, logprobs = np.array(dist.token_ids[:top_k]), np.array(dist.logprobs[:top_k])
    return TokenDist(ids.astype(np.int64), logprobs.astype(np.float32), dist.vocab_size, left, _spelled)


def _spelled(ids: Iterable[int]) -> list[str]:
    return [f" token{number}" for number in ids]


class DummyBuilder(Build):
    """Builds backends of kind ``dummy``."""

    def check(self, spec: ModelSpec) -> Plan:
        """Read the answers of ``spec``.

        Raises:
            SpecError: Its file of answers cannot be read, or is malformed.
        """
        plan = Plan.of(spec)
        read = read_answers(spec.answers) if isinstance(spec.answers, Path) else spec.answers
        return replace(plan, read=read, sizes={})  # there is no model, and no weights

    def build(self, plan: Plan) -> DummyBackend:
        """Make a backend of the answers."""
        return DummyBackend(plan.read, name=plan.spec.base)
