"""`HFView`: scoring and generation in one state of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sway.backends.hf.generation import generate
from pytest_sway.backends.hf.scoring import scores
from pytest_sway.backends.local.pooled_view import PooledView

if TYPE_CHECKING:
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True


class HFView(PooledView):
    """One view of a backend. `HFBackend.as_base` and its siblings return it.

    Scoring runs many questions in one pass and computes common prefixes once. Sequences are packed into one row. If the
    model's attention does not allow that, completions of one prompt continue from its key-value cache. In float32, each
    log-probability is within 2e-4 nats per token of the value for the question alone. The same questions in the same
    order give the same bits.

    Generation packs prompts in the same way, and each pass computes the next token of all texts. Otherwise transformers
    generates with its key-value cache, and prompts are padded on the left. Trials on a few tokens show which of this
    changes no text. If all of it does, each new token takes a pass over the whole text.

    ``model`` is the ``PeftModel``, or the Hugging Face model if there is no adapter.
    """

    def _logprobs(self, pairs: list[tuple[Prompt, str]]) -> list[float]:
        return scores.logprobs_of(self._run, pairs)

    def _rolling(self, texts: list[str], prefix: bool) -> list[RollingLogprob]:
        return scores.rolling_logprobs(self._run, texts, prefix)

    def _dists(self, prompts: list[Prompt], top_k: int) -> list[TokenDist]:
        return self._with_texts(lambda: scores.next_token_dists(self._run, prompts, top_k))

    def _continued(self, prompts: list[Prompt], settings: SamplingParams, seeds: list[int]) -> list[str]:
        return generate.generate_many(self._run, prompts, settings, seeds)
