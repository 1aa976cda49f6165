"""What is asked of both sides, and one score for each question."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, SupportsFloat, TypeAlias

from pytest_sway.backends.questions import checked_pair, listed, shortened
from pytest_sway.errors import ComparisonError, ScoringError

if TYPE_CHECKING:
    from pytest_sway.protocols import View

__tracebackhide__ = True

Score: TypeAlias = "Callable[[Any, list[Any]], Iterable[SupportsFloat]]"
"""A function of a view and the questions that gives one number for each, more for a better answer."""

_UNITS: Final = {"pair": "nats an answer", "text": "nats per token"}
_OWN: Final = "a question"


class Questions:
    """The questions of one comparison.

    Args:
        questions: Pairs of a prompt and an answer, or texts; with ``score``, anything.
        score: What scores them; ``None`` for the log-probability of each answer, or of each token of a text.

    Attributes:
        asked: The questions, in their order.
        unit: What one point of the scores is.

    Raises:
        ComparisonError: They are of several kinds or of none, one is there twice, or all have one prompt.
    """

    def __init__(self, questions: Iterable[Any], score: Score | None = None) -> None:
        self._score = score
        self._tokens: dict[int, int] = {}
        try:
            self.asked: Final = listed(questions, "questions")
        except ScoringError as error:
            raise ComparisonError(str(error)) from None
        if score is not None and not callable(score):
            raise ComparisonError(f"score= is a function of a view and the questions; found {shortened(score)}.")
        kinds = [_OWN if score is not None else _kind(question, at) for at, question in enumerate(self.asked)]
        for at, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise ComparisonError(
                    f"questions are of one kind, and questions[0] is a {kinds[0]}, questions[{at}] a {kind}. Compare"
                    " them apart, or pass score=."
                )
        self._kind = kinds[0] if kinds else _OWN
        self.unit: Final = _UNITS.get(self._kind) or str(getattr(score, "unit", "points"))
        self._refuse_repeated()
        if (prompts := len(self.clusters())) < 2:
            raise ComparisonError(
                f"a comparison needs at least 2 different prompts, and there are {prompts}: answers to one prompt say"
                " little about others. Ask more; 20 to 200 are usual."
            )

    def scored_by(self, view: View, name: str) -> list[float]:
        """Return what each of the questions scores on a view.

        Args:
            view: One side.
            name: What it is called in errors.

        Raises:
            ComparisonError: There is not one finite number for each question.
        """
        given = self._answers(view)
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
            raise ComparisonError(f"score= gives one number for each question; found {shortened(given)} for {name}.")
        scores = [self._number(score, at, name) for at, score in enumerate(given)]
        if len(scores) != len(self.asked):
            raise ComparisonError(
                f"score= gives one number for each question; found {len(scores)} for {len(self.asked)} questions"
                f" of {name}."
            )
        return scores

    def clusters(self) -> list[list[int]]:
        """The positions of the questions, those of equal prompts together."""
        found: dict[str, list[int]] = {}
        for at, prompt in enumerate(self._prompts()):
            found.setdefault(prompt, []).append(at)
        return list(found.values())

    def _answers(self, view: Any) -> Any:
        if self._score is not None:
            return self._score(view, list(self.asked))
        if self._kind == "pair":
            many = getattr(view, "logprobs_of", None)
            return many(self.asked) if many else [view.logprob_of(*pair) for pair in self.asked]
        many = getattr(view, "rolling_logprobs", None)
        rolled = many(self.asked) if many else [view.rolling_logprob(text) for text in self.asked]
        return [self._per_token(each, at) for at, each in enumerate(rolled)]

    def _per_token(self, rolled: Any, at: int) -> float:
        """Nats per token, where the other side has as many."""
        tokens = len(rolled.logprobs)
        if tokens == 0:
            raise ComparisonError(f"questions[{at}] has no token to score. Take the text out.")
        if (others := self._tokens.setdefault(at, tokens)) != tokens:
            raise ComparisonError(
                f"questions[{at}] has {others} tokens on one side and {tokens} on the other, whose tokenizers differ:"
                " nats per token are not comparable. Compare pairs of a prompt and an answer, or pass score=."
            )
        return float(rolled.total_logprob) / tokens

    def _number(self, score: Any, at: int, name: str) -> float:
        try:
            number = float(score)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(score, str) or not math.isfinite(number):
            raise ComparisonError(
                f"the score of questions[{at}] ({shortened(self.asked[at])}) is {shortened(score)} for {name}; a"
                " comparison needs finite numbers."
            )
        return number

    def _refuse_repeated(self) -> None:
        first: dict[str, int] = {}
        for at, question in enumerate(self.asked):
            if (earlier := first.setdefault(_canonical(question), at)) != at:
                raise ComparisonError(
                    f"questions[{at}] is questions[{earlier}] once more ({shortened(question)}); a repeated question"
                    " shows nothing new. Take it out."
                )

    def _prompts(self) -> list[str]:
        asked = (question[0] if _is_pair(question) or _has_choices(question) else question for question in self.asked)
        return [_canonical(prompt) for prompt in asked]


def _is_pair(question: Any) -> bool:
    try:
        checked_pair(question)
    except ScoringError:
        return False
    return isinstance(question, Sequence)


def _has_choices(question: Any) -> bool:
    """Whether it is a prompt with several answers and what is to be said of them."""
    if isinstance(question, str | bytes) or not isinstance(question, Sequence) or len(question) != 3:
        return False
    choices = question[1]
    return isinstance(choices, list | tuple) and all(isinstance(choice, str) for choice in choices)


def _kind(question: Any, at: int) -> str:
    if isinstance(question, str):
        return "text"
    if _is_pair(question):
        return "pair"
    raise ComparisonError(
        f"a question is a text, or a pair of a prompt and an answer; questions[{at}] is {shortened(question)}. For"
        " questions of another kind, pass score=."
    )


def _canonical(question: Any) -> str:
    """A text that is equal for equal questions."""
    try:
        return json.dumps(question, sort_keys=True, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, or a circle
        return repr(question)
