"""`Questions`: the questions of a comparison, and one score for each."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, SupportsFloat, TypeAlias, TypeVar

from pytest_sway.backends.questions import checked_pair, listed
from pytest_sway.errors import ComparisonError, ScoringError
from pytest_sway.system.wording import shown, visible

if TYPE_CHECKING:
    from pytest_sway.protocols import View

__tracebackhide__ = True

Score: TypeAlias = "Callable[[Any, list[Any]], Iterable[SupportsFloat]]"
"""A function of a view and the questions that returns one number for each; better answers get larger numbers."""

_F = TypeVar("_F", bound=Callable[..., Any])

_UNITS: Final = {"pair": "nats an answer", "text": "nats per token"}
_SCORES: Final = {"pair": "logprob_of", "text": "rolling_logprob"}
POINTS: Final = "points"
"""The unit of a score of unknown scale."""

_OWN: Final = "a question"
_LONGEST: Final = 60
_LARGEST: Final = 1e100
"""The largest score: its third power, which the interval takes, is still a number."""

_ADDRESS: Final = re.compile(r" at 0x[0-9a-fA-F]+")


class Questions:
    """The questions of one comparison.

    Args:
        questions: Pairs of a prompt and an answer, or texts; with ``score``, anything.
        score: Scores them; ``None`` for the log-probability of each answer, or of each token of a text.

    Attributes:
        asked: The questions, in their order.
        unit: The unit of the scores.
        score: The name of the score.
        tokens: By position, the number of tokens that a text's score is a mean over; filled when it is scored.

    Raises:
        ComparisonError: The questions are of several kinds or of an unknown one, one repeats, or all have one prompt.
    """

    def __init__(self, questions: Iterable[Any], score: Score | None = None) -> None:
        self._score = score
        self.tokens: Final[dict[int, int]] = {}
        try:
            self.asked: Final = listed(questions, "questions")
        except ScoringError as error:
            raise ComparisonError(str(error)) from None
        if score is not None and not callable(score):
            raise ComparisonError(f"score= is a function of a view and the questions; found {shown(score)}.")
        if score is not None and getattr(score, "makes_score", False):
            raise ComparisonError(f"{_name(score)} makes a score: call it, as in score={_name(score)}(...).")
        kinds = [_OWN if score is not None else _kind(question, at) for at, question in enumerate(self.asked)]
        for at, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise ComparisonError(
                    f"all questions must be of one kind, but questions[0] is a {kinds[0]} and questions[{at}] is a"
                    f" {kind}. Compare them separately, or pass score=."
                )
        self._kind = kinds[0] if kinds else _OWN
        self.unit: Final = _UNITS.get(self._kind) or str(getattr(score, "unit", POINTS))
        self.score: Final = _SCORES.get(self._kind) or _name(score)
        self._refuse_repeated()
        self._clusters = self._grouped()
        if (prompts := len(self._clusters)) < 2:
            raise ComparisonError(
                f"a comparison needs at least 2 different prompts, and there are {prompts}: answers to one prompt say"
                " little about others. Add prompts; 20 to 200 are usual."
            )

    @property
    def in_nats(self) -> bool:
        """Whether the scores are log-probabilities or divergences, so that 0 and 1 are no right and wrong answers."""
        return self.unit.startswith("nats")

    def scored_by(self, view: View, name: str) -> list[float]:
        """Return the score of each question on a view.

        Args:
            view: The view of one side.
            name: The side's name in errors.

        Raises:
            ComparisonError: The score is not one finite number for each question.
        """
        given = self._answers(view)
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
            raise ComparisonError(f"score= gives one number for each question; found {shown(given)} for {name}.")
        scores = [self._number(score, at, name) for at, score in enumerate(given)]
        if len(scores) != len(self.asked):
            raise ComparisonError(
                f"score= gives one number for each question; found {len(scores)} for {len(self.asked)} questions"
                f" of {name}."
            )
        return scores

    def clusters(self) -> list[list[int]]:
        """Return the positions of the questions, grouped by prompt."""
        return self._clusters

    def mean(self, numbers: Sequence[float]) -> float:
        """Return the mean of one number per question; questions with equal prompts count as one."""
        means = [math.fsum(numbers[at] for at in cluster) / len(cluster) for cluster in self.clusters()]
        return math.fsum(means) / len(means)

    def digests(self) -> list[str]:
        """Return a digest of each question that is the same in every run and on every machine.

        Raises:
            ComparisonError: A question is or contains an object that another run cannot recognise.
        """
        texts = [_canonical(question, _lasting) for question in self.asked]
        return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]

    def expect_tokens(self, tokens: Mapping[int, int]) -> None:
        """Refuse texts, from now on, whose number of tokens is not the one given here by position."""
        self.tokens.update(tokens)

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
        """Return nats per token; refuse a text that the other side cuts into another number of tokens."""
        tokens = len(rolled.logprobs)
        if tokens == 0:
            raise ComparisonError(f"questions[{at}] has no token to score. Remove the text.")
        if (others := self.tokens.setdefault(at, tokens)) != tokens:
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
        if isinstance(score, str) or not abs(number) <= _LARGEST:  # so that NaN is refused, too
            raise ComparisonError(
                f"the score of questions[{at}] ({shown(self.asked[at])}) is {shown(score)} for {name}; a"
                f" comparison needs finite numbers, from -{_LARGEST:g} to {_LARGEST:g}."
            )
        return number

    def _refuse_repeated(self) -> None:
        first: dict[str, int] = {}
        for at, question in enumerate(self.asked):
            if (earlier := first.setdefault(_canonical(question), at)) != at:
                raise ComparisonError(
                    f"questions[{at}] repeats questions[{earlier}] ({shown(question)}); a repeated question adds no"
                    " information. Remove it."
                )

    def _grouped(self) -> list[list[int]]:
        found: dict[str, list[int]] = {}
        for at, question in enumerate(self.asked):
            prompt = question[0] if _is_pair(question) or _has_choices(question) else question
            found.setdefault(_canonical(prompt), []).append(at)
        return list(found.values())


def _is_pair(question: Any) -> bool:
    try:
        checked_pair(question)
    except ScoringError:
        return False
    return isinstance(question, Sequence)


def _has_choices(question: Any) -> bool:
    """Return whether a question is a prompt with several choices and their label."""
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
        f"a question is a text, or a pair of a prompt and an answer; questions[{at}] is {shown(question)}. For"
        " questions of another kind, pass score=."
    )


def makes_score(function: _F) -> _F:
    """Mark a function that returns a score, so that it is not taken for one."""
    function.makes_score = True  # type: ignore[attr-defined] # which `Questions` looks for
    return function


def _name(score: Any) -> str:
    """Return the name of a score: its function's, also within a ``partial`` with its arguments; else its class's."""
    if not isinstance(score, partial):
        return str(getattr(score, "__name__", type(score).__name__))
    given = [*map(shown, score.args), *(f"{name}={shown(value)}" for name, value in score.keywords.items())]
    return _ADDRESS.sub("", f"{_name(score.func)}({', '.join(given)})")


def beginning(question: Any) -> str:
    """Return the beginning of a question on one line without control characters; a pair of texts is joined."""
    pair = isinstance(question, Sequence) and all(isinstance(part, str) for part in question)
    text = visible(" ".join(("".join(question) if pair else repr(question)).split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _canonical(question: Any, as_text: Callable[[Any], str] = repr) -> str:
    """Return a text that is equal for equal questions; ``as_text`` writes what JSON cannot hold."""
    try:
        return json.dumps(question, sort_keys=True, default=partial(_held, as_text=as_text))
    except (TypeError, ValueError, RecursionError) as error:  # keys that are not text, or a circle
        if isinstance(error, ComparisonError):
            raise
        return as_text(question)


def _held(part: Any, as_text: Callable[[Any], str]) -> Any:
    """Return what a part of a question holds, if its ``repr`` orders it by chance or leaves out some of it."""
    if isinstance(part, set | frozenset):
        return sorted(_canonical(each, as_text) for each in part)
    if callable(to_list := getattr(part, "tolist", None)):  # arrays and tensors
        try:
            content = _canonical(to_list(), as_text)
        except RuntimeError:  # a tensor without content, or a sparse one
            return as_text(part)
        digest = hashlib.sha256(content.encode()).hexdigest()  # an image has many numbers
        return [type(part).__name__, str(getattr(part, "dtype", "")), digest]
    return as_text(part)


def _lasting(part: Any) -> str:
    """Return the ``repr`` of a part of a question, if it is the same in every run."""
    text = repr(part)
    if address := _ADDRESS.search(text):
        raise ComparisonError(
            f"the question {shown(part)} is identified only by{address[0]}, its address in memory, which differs in"
            " every run. Ask texts, numbers, lists or dicts, or give its class a __repr__."
        )
    return text
