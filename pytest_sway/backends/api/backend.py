"""`ApiBackend`: a base and a fine-tuned model on servers. `ApiView`: the questions that a test asks of one of them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.api import scoring
from pytest_sway.backends.api.event_loop import LoopClosedError, in_order
from pytest_sway.backends.contract import HintsAtViews, opens_view, preflight
from pytest_sway.backends.view import BaseView, ViewOwner, closed_error
from pytest_sway.errors import NoAdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator, Mapping

    from pytest_sway.backends.api.connection import Connection
    from pytest_sway.backends.api.event_loop import EventLoopThread
    from pytest_sway.backends.api.served_model import ServedModel
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Chat, Message, Prompt, RollingLogprob, TokenDist
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


class ApiBackend(HintsAtViews):
    """Two models on OpenAI-compatible servers; made by `build_api`.

    Any number of views may be open at once, in any number of threads. Their requests share the connections.

    Args:
        spec: The spec that it was built from.
        loop: The event loop of the requests.
        connection: The connections to the servers.
        base: The base.
        tuned: The fine-tuned model, if the spec names one.
    """

    safe_for_concurrent_views = True

    def __init__(
        self,
        spec: ModelSpec,
        loop: EventLoopThread,
        connection: Connection,
        base: ServedModel,
        tuned: ServedModel | None,
    ) -> None:
        self._spec = spec
        self._loop = loop
        self._connection = connection
        self._base = base
        self._tuned = tuned

    def __repr__(self) -> str:
        return f"<ApiBackend {self}{', closed' if self._loop.closed else ''}>"

    def __str__(self) -> str:
        return str(self._spec)

    @property
    def spec(self) -> ModelSpec:
        """The spec that it was built from."""
        return self._spec

    @opens_view
    def as_base(self) -> Iterator[ApiView]:
        """Open a view on the base."""
        with self._view("base", self._base) as view:
            yield view

    @opens_view
    def as_finetuned(self) -> Iterator[ApiView]:
        """Open a view on the fine-tuned model.

        Raises:
            NoAdapterError: The spec names none.
        """
        if self._tuned is None:
            raise NoAdapterError(
                f"as_finetuned() needs a fine-tuned model, but the spec of {self._spec} names none. Add"
                " 'finetuned': <its name on the server> to the spec, or use as_base()."
            )
        with self._view("ft", self._tuned) as view:
            yield view

    def cache_identity(self) -> str:
        """Return an identity of this pair of models, for caches of their answers."""
        return f"api:{self._base}:{self._tuned}"

    def preflight_finite_check(self) -> tuple[bool, str]:
        """Score one prompt on each side; return ``(True, "")``, or ``(False, reason)``."""
        self._require()
        return preflight({"base": self.as_base} | ({} if self._tuned is None else {"ft": self.as_finetuned}))

    def sizes(self) -> Mapping[Hashable, int]:
        """Return the bytes of each part in this machine's memory: there are none."""
        return {}

    def close(self) -> None:
        """Close the connections. Requests under way fail with `BackendClosedError`. Closing twice is harmless."""
        self._loop.close(self._connection.close)

    @contextmanager
    def _view(self, view_id: str, model: ServedModel) -> Iterator[ApiView]:
        self._require()
        with ApiView(view_id, self, model) as view:
            yield view

    def _run(self, view: ApiView, work: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...]) -> Any:
        try:
            return self._loop.run(work(view.served, *args))
        except LoopClosedError:
            raise closed_error(f"the backend of {self._spec}") from None

    def _view_closed(self, view: ApiView) -> None:
        """Nothing is kept for a view."""

    def _require(self) -> None:
        if self._loop.closed:
            raise closed_error(f"the backend of {self._spec}")


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
