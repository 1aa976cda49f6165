"""`ApiView`: the questions that a test asks of a model on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.api import scoring
from pytest_sway.backends.api.event_loop import in_order
from pytest_sway.backends.view import BaseView, ViewOwner

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from pytest_sway.backends.api.served_model import ServedModel
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Chat, Message, Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True


class ApiView(BaseView[ViewOwner]):
    """One side of a backend; made by `ApiBackend.as_base` and `ApiBackend.as_finetuned`.

    A call for many sends several requests at a time; the first error cancels the rest. Each call raises `ServerError`
    if the server fails. Prompts must be texts: messages are refused, also by `render`, since only the server has the
    chat template.

    The token that begins a text is the BOS that the server puts before it and shows, as vLLM does for models with a
    BOS. Most servers give fewer tokens of a distribution than ``top_k`` (vLLM 20 by default, OpenAI 5): you get all
    that they give, and ``tail_logprob`` has the rest of the mass. If a server gives no ids, each token gets a negative
    id of ours, the same for every model. ``vocab_size`` is 0 if the server does not tell it. For sampling, a server may
    use further settings of its own, and may ignore the seed.

    Attributes:
        id: ``base`` or ``ft``.
        served: The model that it asks.
    """

    def __init__(self, view_id: str, backend: ViewOwner, served: ServedModel) -> None:
        super().__init__(view_id, backend)
        self.served = served

    def _rendered(self, messages: Iterable[Message] | Chat) -> str:  # noqa: ARG002 # the signature is that of other views
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
