"""`MLXView`: scoring and generation with one side of a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sway.backends.local.pooled_view import PooledView
from pytest_sway.backends.mlx import scores

if TYPE_CHECKING:
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True


class MLXView(PooledView):
    """One side of a backend; made by `MLXBackend.as_base` and the like. It answers like a view of kind ``hf``.

    Many questions are answered one after the other. The same seed samples other texts than in kind ``hf``.

    Its ``model`` is mlx-lm's, and its ``tokenizer`` is mlx-lm's wrapper. What you do to the model through MLX
    (training, writes to arrays, quantization, other layers) stays in this model. A write around MLX, such as to
    ``np.array(weight, copy=False)``, reaches the shared memory, and the test that does it gets a `MutationError`.
    """

    def _logprobs(self, pairs: list[tuple[Prompt, str]]) -> list[float]:
        return scores.logprobs_of(self._run, pairs)

    def _rolling(self, texts: list[str], prefix: bool) -> list[RollingLogprob]:
        return scores.rolling_logprobs(self._run, texts, prefix)

    def _dists(self, prompts: list[Prompt], top_k: int) -> list[TokenDist]:
        return self._with_texts(lambda: scores.next_token_dists(self._run, prompts, top_k))

    def _continued(self, prompts: list[Prompt], settings: SamplingParams, seeds: list[int]) -> list[str]:
        return scores.generate_many(self._run, prompts, settings, seeds)
