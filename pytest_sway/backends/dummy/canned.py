"""Answers of the dummy backend: one side's tables, a mix of two sides, or one side with noise."""

from __future__ import annotations

import difflib
import math
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from pytest_sway.errors import BackendUseError
from pytest_sway.spec.answers import VOCABULARY, tail

__tracebackhide__ = True

_FINETUNED_FACTOR: Final = 0.75
"""Made-up log-probabilities of the fine-tuned side are the base's times this."""


class Dist(NamedTuple):
    """The fields of a `pytest_sway.TokenDist`."""

    token_ids: list[int]
    logprobs: list[float]
    vocab_size: int
    tail_logprob: float | None


class Rolling(NamedTuple):
    """Tokens, and the log-probabilities of all but the first, in nats."""

    token_ids: list[int]
    logprobs: list[float]


class Side(Protocol):
    """The source of a view's answers."""

    def logprob(self, prompt: str, completion: str) -> float:
        """The completion's log-probability, in nats."""
        ...

    def rolling(self, text: str, prefix: bool) -> Rolling:
        """The log-probabilities of a text's tokens, in nats."""
        ...

    def dist(self, prompt: str) -> Dist:
        """What comes after a prompt, most probable first."""
        ...

    def generation(self, prompt: str, words: int) -> str:
        """A continuation, ``words`` long if it is made up."""
        ...


class Canned:
    """One side's tables; answers of missing tables are made up."""

    def __init__(self, name: str, tables: Mapping[str, Any]) -> None:
        self.name = name
        self._tables = tables
        self._factor = 1.0 if name == "base" else _FINETUNED_FACTOR

    @property
    def finite(self) -> bool:
        """Whether no canned number is NaN or infinite."""
        return all(map(math.isfinite, _numbers(self._tables)))

    def logprob(self, prompt: str, completion: str) -> float:
        """From the table, or made up of the words' numbers."""
        table = self._tables.get("logprobs")
        if table is None:
            return sum(self._made_up(completion.split() or [completion]))
        completions = self._found("logprobs", table, prompt, "prompt")
        return float(self._found("logprobs", completions, completion, f"completion of {prompt!r}"))

    def rolling(self, text: str, prefix: bool) -> Rolling:
        """From the table, or made up of the words' numbers."""
        table = self._tables.get("rolling")
        if table is not None:
            return Rolling(**self._found("rolling", table, text, "text"))
        words = text.split()
        ids = [_number_of(word) % VOCABULARY for word in words]
        return Rolling([0, *ids], self._made_up(words)) if prefix else Rolling(ids, self._made_up(words[1:]))

    def dist(self, prompt: str) -> Dist:
        """From the table, or made up."""
        table = self._tables.get("token_dists")
        if table is not None:
            return Dist(**self._found("token_dists", table, prompt, "prompt"))
        # As in dlm-sway, the base's distribution is sharp, and the fine-tuned side's is broad
        sharp, broad = [-0.1] + [-5.0] * 7, [-math.log(8) + step * 1e-5 for step in range(4, -4, -1)]
        logprobs = sharp if self.name == "base" else broad
        return Dist(list(range(8)), logprobs, VOCABULARY, tail(logprobs, VOCABULARY))

    def generation(self, prompt: str, words: int) -> str:
        """From the table, or made up."""
        table = self._tables.get("generations")
        if table is not None:
            return str(self._found("generations", table, prompt, "prompt"))
        return "".join(f" {self.name}{number}" for number in range(words))

    def _made_up(self, words: Sequence[str]) -> list[float]:
        return [-self._factor * (1.0 + _number_of(word) / 2**31) for word in words]

    def _found(self, name: str, table: Mapping[str, Any], asked: str, what: str) -> Any:
        if asked not in table:
            close = difflib.get_close_matches(asked, table, n=1, cutoff=0.0)
            raise BackendUseError(
                f"the {self.name} side of the dummy backend has no canned answer in {name!r} for the {what} {asked!r}."
                f" The closest of its {len(table)} entries is {', '.join(map(repr, close)) or 'none'}. Add the answer,"
                f" or omit the table {name!r} to have answers made up."
            )
        return table[asked]


def _numbers(answers: Any) -> Iterator[float]:
    if isinstance(answers, float):
        yield answers
    elif isinstance(answers, Mapping | list):
        for part in answers.values() if isinstance(answers, Mapping) else answers:
            yield from _numbers(part)


def _number_of(word: str) -> int:
    """A number below 2**32 that is the same in every process."""
    return zlib.crc32(word.encode())


class Between:
    """Log-probabilities on the line between two sides, or beyond them if ``lam`` is not between 0 and 1."""

    def __init__(self, base: Side, tuned: Side, lam: float) -> None:
        self._sides = (base, tuned)
        self._lam = lam

    def logprob(self, prompt: str, completion: str) -> float:
        """On the line between the two sides'."""
        return self._mixed(*(side.logprob(prompt, completion) for side in self._sides))

    def rolling(self, text: str, prefix: bool) -> Rolling:
        """On the line between the two sides', which must have equally many tokens."""
        base, tuned = (side.rolling(text, prefix) for side in self._sides)
        if len(base.logprobs) != len(tuned.logprobs):
            raise self._apart("rolling log-probabilities", text)
        return Rolling(base.token_ids, list(map(self._mixed, base.logprobs, tuned.logprobs)))

    def dist(self, prompt: str) -> Dist:
        """On the line between the two sides', which must have the same tokens; normalised."""
        base, tuned = (side.dist(prompt) for side in self._sides)
        theirs = dict(zip(tuned.token_ids, tuned.logprobs, strict=True))
        if theirs.keys() != set(base.token_ids):
            raise self._apart("distributions", prompt)
        mixed = [self._mixed(a, theirs[i]) for i, a in zip(base.token_ids, base.logprobs, strict=True)]
        return _normalised(base, mixed)

    def generation(self, prompt: str, words: int) -> str:
        """The nearer side's."""
        return self._sides[self._lam >= 0.5].generation(prompt, words)

    def _mixed(self, base: float, tuned: float) -> float:
        return (1.0 - self._lam) * base + self._lam * tuned

    @staticmethod
    def _apart(what: str, text: str) -> BackendUseError:
        return BackendUseError(
            f"as_scaled_adapter cannot mix the canned {what} of the two sides for {text!r}: their tokens differ. Give"
            " both sides the same tokens."
        )


class Noisy:
    """A side with noise on its log-probabilities."""

    def __init__(self, side: Side, seed: int, scale: float) -> None:
        self._side = side
        self._seed = seed
        self._scale = scale

    def logprob(self, prompt: str, completion: str) -> float:
        """The side's, with noise."""
        return self._noisy([self._side.logprob(prompt, completion)], prompt + "\0" + completion)[0]

    def rolling(self, text: str, prefix: bool) -> Rolling:
        """The side's, with noise on each."""
        ids, logprobs = self._side.rolling(text, prefix)
        return Rolling(ids, self._noisy(logprobs, text))

    def dist(self, prompt: str) -> Dist:
        """The side's, with noise on each, normalised."""
        dist = self._side.dist(prompt)
        return _normalised(dist, self._noisy(dist.logprobs, prompt))

    def generation(self, prompt: str, words: int) -> str:
        """The side's."""
        return self._side.generation(prompt, words)

    def _noisy(self, logprobs: Sequence[float], text: str) -> list[float]:
        draw = random.Random(f"{self._seed}\0{text}")  # noqa: S311 # noise, the same in every process
        return [min(0.0, logprob + draw.gauss(0.0, self._scale)) for logprob in logprobs]


def _normalised(dist: Dist, logprobs: list[float]) -> Dist:
    """The distribution with these log-probabilities, most probable first, shifted to the mass of ``dist``."""
    shift = math.log(sum(map(math.exp, dist.logprobs))) - math.log(sum(map(math.exp, logprobs)))
    ranked = sorted(zip(logprobs, dist.token_ids, strict=True), key=lambda pair: -pair[0])
    return dist._replace(token_ids=[i for _, i in ranked], logprobs=[logprob + shift for logprob, _ in ranked])
