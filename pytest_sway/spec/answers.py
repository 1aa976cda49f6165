"""Parse canned answers for backends of kind ``dummy`` into the JSON text that a spec keeps.

Each side, ``base`` and ``finetuned``, has up to four tables, named as in dlm-sway's ``DummyResponses``::

    logprobs     {prompt: {completion: nats}}, or {(prompt, completion): nats}
    rolling      {text: [nats of the second token, of the third, ...]}, or {text: a RollingLogprob or its fields}
    token_dists  {prompt: a TokenDist or its fields; vocab_size and tail_logprob may be left out}
    generations  {prompt: text}

You can give them as a Python mapping, a JSON file or a TOML file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from pytest_sway.errors import SpecError
from pytest_sway.protocols import log_of_tail
from pytest_sway.system.reading import INDEX_BYTES, read_bounded

__tracebackhide__ = True

_T = TypeVar("_T", int, float)
SIDES: Final = ("base", "finetuned")
VOCABULARY: Final = 1000
"""The vocabulary size of a canned distribution that names none."""
_ROUNDING: Final = 1e-6
"""How far above 0 a log-probability may be, since it was computed in fp32."""


def canonical(answers: Mapping[str, Any] | str) -> str:
    """Return answers as JSON text; equal answers give equal text.

    Args:
        answers: A mapping by side, or the JSON text of one.

    Raises:
        SpecError: The answers have none of the forms above.
    """
    if isinstance(answers, str):
        try:
            answers = json.loads(answers)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"spec field 'answers' is not valid JSON: {error}.") from error
    sides = {_known(side, SIDES, "side"): _tables(side, tables) for side, tables in _mapping(answers, "").items()}
    return json.dumps(sides, sort_keys=True)


def read_answers(path: Path) -> str:
    """Return the `canonical` answers in a file: TOML if its name ends in ``.toml``, else JSON.

    Raises:
        SpecError: The file cannot be read, or its answers are malformed.
    """
    import tomllib

    try:
        text = read_bounded(path, INDEX_BYTES).decode("utf-8-sig")
        parsed = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"the answers {str(path)!r} cannot be read: {error}. Name a JSON or TOML file.") from error
    try:
        return canonical(parsed)
    except SpecError as error:
        raise SpecError(f"{error} (Read from {str(path)!r}.)") from error


def tail(logprobs: list[float], vocabulary: int) -> float | None:
    """The log of the probability that a distribution's tokens leave, by `pytest_sway.TokenDist`'s convention.

    Args:
        logprobs: The log-probabilities of its tokens.
        vocabulary: The number of tokens in the vocabulary; 0 if unknown.
    """
    if 0 < vocabulary <= len(logprobs):
        return None
    return log_of_tail(1.0 - sum(map(math.exp, logprobs)))


def _tables(side: str, tables: Any) -> dict[str, Any]:
    return {
        _known(table, _FORMS, "table", f" on side {side!r}"): _FORMS[table](content, f"{side}.{table}")
        for table, content in _mapping(tables, side).items()
    }


def _logprobs(content: Any, where: str) -> dict[str, dict[str, float]]:
    by_prompt: dict[str, dict[str, float]] = {}
    for key, value in _mapping(content, where).items():
        if isinstance(key, tuple) and len(key) == 2:
            by_prompt.setdefault(_text(key[0], where), {})[_text(key[1], where)] = _number(value, where)
        else:
            for completion, number in _mapping(value, where).items():
                by_prompt.setdefault(_text(key, where), {})[_text(completion, where)] = _number(number, where)
    return by_prompt


def _rolling(content: Any, where: str) -> dict[str, dict[str, Any]]:
    rolling = {}
    for text, value in _mapping(content, where).items():
        is_list = isinstance(value, list | tuple)
        fields = {"logprobs": value} if is_list else _fields(value, ("logprobs",), ("token_ids",), where)
        logprobs = _numbers(fields["logprobs"], where, _logprob)
        ids = _numbers(fields.get("token_ids", range(len(logprobs) + 1)), where, _whole)
        if len(ids) != len(logprobs) + 1:
            raise _wrong(where, "one token more than log-probabilities", _counts(ids, logprobs))
        rolling[_text(text, where)] = {"token_ids": ids, "logprobs": logprobs}
    return rolling


def _dists(content: Any, where: str) -> dict[str, dict[str, Any]]:
    dists = {}
    for prompt, value in _mapping(content, where).items():
        fields = _fields(value, ("token_ids", "logprobs"), ("vocab_size", "tail_logprob"), where)
        logprobs = _numbers(fields["logprobs"], where, _logprob)
        ids = _numbers(fields["token_ids"], where, _whole)
        if len(ids) != len(logprobs) or not ids:
            raise _wrong(where, "as many tokens as log-probabilities", _counts(ids, logprobs))
        # A server's tokens without ids get negative ones from their spellings, which may be equal.
        twice = next((i for i, times in Counter(ids).items() if times > 1 and i >= 0), None)
        if twice is not None:
            raise _wrong(where, "each token once", f"token {twice} twice")
        vocabulary = _whole(fields.get("vocab_size", max(VOCABULARY, max(ids) + 1)), where)
        if vocabulary < len(ids) and vocabulary != 0:  # a server does not report it
            raise _wrong(where, "a vocab_size of at least its tokens", f"{vocabulary} for {len(ids)} tokens")
        left = fields["tail_logprob"] if "tail_logprob" in fields else tail(logprobs, vocabulary)
        ranked = sorted(zip(logprobs, ids, strict=True), key=lambda pair: -pair[0])
        dists[_text(prompt, where)] = {
            "token_ids": [i for _, i in ranked],
            "logprobs": [logprob for logprob, _ in ranked],
            "vocab_size": vocabulary,
            "tail_logprob": None if left is None else _logprob(left, where),
        }
    return dists


def _generations(content: Any, where: str) -> dict[str, str]:
    return {_text(prompt, where): _text(text, where) for prompt, text in _mapping(content, where).items()}


_FORMS: Final[dict[str, Callable[[Any, str], Any]]] = {
    "logprobs": _logprobs,
    "rolling": _rolling,
    "token_dists": _dists,
    "generations": _generations,
}


def _fields(value: Any, needed: tuple[str, ...], others: tuple[str, ...], where: str) -> Mapping[str, Any]:
    names = (*needed, *others)
    fields = value if isinstance(value, Mapping) else {n: getattr(value, n) for n in names if hasattr(value, n)}
    if any(fields.get(name) is None for name in needed):
        raise _wrong(where, f"a list of numbers as {' and '.join(needed)}", repr(value))
    return fields


def _known(name: Any, names: Any, what: str, where: str = "") -> str:
    if name not in names:
        raise SpecError(f"spec field 'answers' has no {what} {name!r}{where}; choose one of {', '.join(names)}.")
    return str(name)


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(where, "a mapping", repr(value))
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "text", repr(value))
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, str | bool) or not hasattr(type(value), "__float__"):
        raise _wrong(where, "a number", repr(value))
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):  # a long integer, or an array of several numbers
        raise _wrong(where, "a number", repr(value)) from None


def _logprob(value: Any, where: str) -> float:
    number = _number(value, where)
    if _ROUNDING < number < math.inf:  # those that are not finite are for `preflight_finite_check`
        raise _wrong(where, "log-probabilities, which are at most 0", repr(value))
    return number


def _whole(value: Any, where: str) -> int:
    if not _number(value, where).is_integer() or not -(2**63) <= int(value) < 2**63:  # a server's ids may be negative
        raise _wrong(where, "whole numbers of 64 bits as token_ids and vocab_size", repr(value))
    return int(value)


def _numbers(values: Any, where: str, number: Callable[[Any, str], _T]) -> list[_T]:
    try:
        return [number(value, where) for value in values]
    except TypeError:
        raise _wrong(where, "a list of numbers", repr(values)) from None


def _counts(ids: list[int], logprobs: list[float]) -> str:
    return f"{len(ids)} tokens and {len(logprobs)} log-probabilities"


def _wrong(where: str, wanted: str, found: str) -> SpecError:
    place = f" at {where!r}" if where else ""
    return SpecError(f"spec field 'answers'{place} must hold {wanted}; found {found}.")
