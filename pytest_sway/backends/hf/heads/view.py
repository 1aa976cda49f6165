"""`HeadView`: a view of a model with another head than a causal language model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_sway.backends.local.pooled_view import PooledView

if TYPE_CHECKING:
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Prompt, RollingLogprob, TokenDist

__tracebackhide__ = True


class HeadView(PooledView):
    """A view that refuses all questions, and has ``model`` and ``tokenizer``. Each head answers its own."""

    def _logprobs(self, pairs: list[tuple[Prompt, str]]) -> list[float]:  # noqa: ARG002
        raise self._unanswered("logprob_of")

    def _rolling(self, texts: list[str], prefix: bool) -> list[RollingLogprob]:  # noqa: ARG002
        raise self._unanswered("rolling_logprob")

    def _dists(self, prompts: list[Prompt], top_k: int) -> list[TokenDist]:  # noqa: ARG002
        raise self._unanswered("next_token_dist")

    def _continued(self, prompts: list[Prompt], settings: SamplingParams, seeds: list[int]) -> list[str]:  # noqa: ARG002
        raise self._unanswered("generate")

    def _not_finite(self, label: str) -> str:  # noqa: ARG002 # the trial of each load has found NaN already
        return ""


class TokenClassifierView(HeadView):
    """A view of a token classifier."""

    task: ClassVar[str] = "token_classification"


class QuestionAnsweringView(HeadView):
    """A view of a model that finds answers in a text."""

    task: ClassVar[str] = "question_answering"
