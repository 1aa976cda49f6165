"""A view: what a test asks of one of the two models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.api import scoring
from pytest_sway.backends.api.event_loop import in_order
from pytest_sway.backends.view import BaseView, ViewOwner

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from pytest_sway.backends.api.served_model import ServedModel
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Message, Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True


class ApiView(BaseView[ViewOwner]):
    """One side of a backend; made by `ApiBackend.as_base` and `ApiBackend.as_finetuned`.

    The calls for many at once send several requests at a time; the first error cancels the rest. Each raises
    `ServerError` where the server fails. Prompts are texts: those of messages are refused, as by `render`, since a
    server applies its chat template out of sight.

    The token that begins a text is the BOS that the server puts in front and shows, as vLLM does for models with a BOS.
    Most servers give fewer tokens of a distribution than ``top_k`` (vLLM 20 unless told otherwise, OpenAI 5): then all
    that they give are returned, and the rest of the mass is in ``tail_logprob``. Servers that give no ids get a number
    of ours for each token, a negative one, which is the same for every model; ``vocab_size`` is 0 where the server does
    not tell it. In sampling, a server may have settings of its own besides, and may not heed the seed.

    Attributes:
        id: ``base`` or ``ft``.
        served: The model that it asks.
    """

    def __init__(self, view_id: str, backend: ViewOwner, served: ServedModel) -> None:
        super().__init__(view_id, backend)
        self.served = served

    def _rendered(self, messages: Iterable[Message]) -> str:  # noqa: ARG002 # the signature is that of other views
        raise scoring.no_template(self.served)

    def _logprobs(self, pairs: list[tuple[Prompt, str]]) -> list[float]:
        return self._each(scoring.logprob_of, pairs)

    def _rolling(self, texts: list[str], prefix: bool) -> list[RollingLogprob]:
        return self._each(scoring.rolling_logprob, [(text, prefix) for text in texts])

    def _dists(self, prompts: list[Prompt], top_k: int) -> list[TokenDist]:
        return self._each(scoring.next_token_dist, [(prompt, top_k) for prompt in prompts])

    def _continued(self, prompts: list[Prompt], settings: SamplingParams, seeds: list[int]) -> list[str]:
        asked = zip(prompts, seeds, strict=True)
        return self._each(scoring.generate, [(prompt, settings, seed) for prompt, seed in asked])

    def _each(self, work: Callable[..., Coroutine[Any, Any, Any]], asked: Iterable[tuple[Any, ...]]) -> list[Any]:
        return list(self._run(_answered, work, asked))


async def _answered(
    model: ServedModel, work: Callable[..., Coroutine[Any, Any, Any]], asked: Iterable[tuple[Any, ...]]
) -> list[Any]:
    return await in_order(work(model, *args) for args in asked)
