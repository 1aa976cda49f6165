"""A view: scoring and generation in one state of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sway.backends.hf.scoring import generation, scores
from pytest_sway.backends.local.pooled_backend import PooledView

if TYPE_CHECKING:
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True


class HFView(PooledView):
    """One side of a backend; made by `HFBackend.as_base` and its like.

    Many questions go through the model together, and have what they begin with in common read once: in one row with it,
    or where the model's attention does not allow that, the completions of one prompt on its key-value cache. In float32
    each log-probability is within 2e-4 nats per token of that for the question alone; the same questions, in the same
    order, give the same bits.

    Text is made with a key-value cache where a trial on a few tokens shows that it does not change the text; else each
    token costs a pass over all of the text. Prompts of similar length go through the model together, padded on the
    left, where a trial shows that the model allows that.

    Its ``model`` is the ``PeftModel``, or without an adapter the Hugging Face model.
    """

    def _logprobs(self, pairs: list[tuple[Prompt, str]]) -> list[float]:
        return scores.logprobs_of(self._run, pairs)

    def _rolling(self, texts: list[str], prefix: bool) -> list[RollingLogprob]:
        return scores.rolling_logprobs(self._run, texts, prefix)

    def _dists(self, prompts: list[Prompt], top_k: int) -> list[TokenDist]:
        return scores.next_token_dists(self._run, prompts, top_k)

    def _continued(self, prompts: list[Prompt], settings: SamplingParams, seeds: list[int]) -> list[str]:
        return generation.generate_many(self._run, prompts, settings, seeds)
