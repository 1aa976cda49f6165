"""`QuestionsOfHeads`: the questions that only models with other heads than a language model's answer."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sway.backends.questions import checked_input, checked_text, listed, whole
from pytest_sway.errors import ScoringError
from pytest_sway.spec.tasks import CAUSAL, TASKS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

    from pytest_sway.protocols import Classification, Input

__tracebackhide__ = True


class QuestionsOfHeads:
    """A part of `BaseView`. What its model's head does not answer, it refuses in one sentence.

    Attributes:
        id: The view's id.
        task: The task of its model, which decides what it answers.
    """

    id: str
    task: ClassVar[str] = CAUSAL

    def classify(self, texts: Iterable[Input]) -> list[Classification]:
        """Return what a sequence classifier or a reward model says of each text, in their order.

        A text is tokenised as the tokenizer does by default. A pair of texts is read as one input, as by a classifier
        of pairs. A conversation is rendered whole by the chat template, without a turn for an answer to begin.

        Raises:
            ScoringError: The view's model is no classifier, or a text is longer than it reads at once.
        """
        self._open()
        return self._classified([whole(checked_input(text)) for text in listed(texts, "texts")])

    def embed(self, texts: Iterable[str], *, pooling: str | None = None) -> NDArray[np.float32]:
        """Return the embedding of each text, float32, shape ``(number of texts, size)``.

        Args:
            texts: The texts.
            pooling: What makes one vector of a text's hidden states: ``mean``, ``cls`` (the first token's), ``last`` or
                ``max``. ``None`` for what the model's own sentence-transformers configuration says; that configuration
                also decides about normalising, the longest text and a prompt before it.

        Raises:
            ScoringError: The view's model is not one for embeddings, or there is no such pooling.
        """
        self._open()
        return self._embedded([whole(checked_text(text, "embed")) for text in listed(texts, "texts")], pooling)

    # --- implemented by the views of models with these heads ----------------------------------------------------------

    def _classified(self, texts: list[Input]) -> list[Classification]:  # noqa: ARG002
        raise self._unanswered("classify")

    def _embedded(self, texts: list[str], pooling: str | None) -> NDArray[np.float32]:  # noqa: ARG002
        raise self._unanswered("embed")

    # --- for views ----------------------------------------------------------------------------------------------------

    def _unanswered(self, question: str) -> ScoringError:
        """Return the error for a question that the model's head does not answer."""
        task = TASKS[self.task]
        answers = f"it answers {', '.join(task.answers)}" if task.answers else "pytest-sway asks it nothing"
        needed = " or ".join(f"task={name!r}" for name, each in TASKS.items() if question in each.answers)
        raw = ", and view.model and view.tokenizer are yours to use" if hasattr(type(self), "model") else ""
        return ScoringError(
            f"{question} is a question for {needed}, but the model of the view {self.id!r} is {task.what}"
            f" (task={self.task!r}): {answers}{raw}."
        )

    @abstractmethod
    def _open(self) -> Any:
        """Return the backend; raise if the view is closed."""
