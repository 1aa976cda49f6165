"""Parse an answer of ``/v1/completions`` in either of the forms in which servers give log-probabilities.

OpenAI, vLLM and llama-cpp-python give parallel lists (``tokens``, ``token_logprobs``, ``top_logprobs``). llama.cpp's
own server and mlx_lm give the list ``content`` of OpenAI's chat answers, with token ids.

Servers that echo a text count differently: vLLM's offsets count the BOS that it puts in front, llama-cpp-python omits
BOS, and none spells a character that consists of several tokens. So the echoed tokens are matched against the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from collections.abc import Sequence


__tracebackhide__ = True

_LONGEST: Final = 40
"""The most characters of a server's value that an error quotes."""

_TOKEN_ID: Final = re.compile(r"token_id:(\d+)")
"""vLLM's spelling of a token with ``return_tokens_as_token_ids``."""

_ROUNDING: Final = 1e-3
"""The most that rounding may put the log-probability of a certain token above 0, in nats."""

T = TypeVar("T")


class MalformedError(ValueError):
    """An answer does not have the form of a completion; the text says where."""


class Candidate(NamedTuple):
    """A token that may come next.

    Attributes:
        token_id: As `Token` has it.
        logprob: In nats.
        text: The server's spelling; ``None`` if it gives the id alone.
    """

    token_id: int
    logprob: float
    text: str | None


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer.

    Attributes:
        text: The server's spelling.
        token_id: Its id in the vocabulary if the server gives it; otherwise `stand_in` of its spelling.
        logprob: In nats; ``None`` if the server gives none, as for the first token of a text.
        top: The most probable tokens in its place, in order.
    """

    text: str
    token_id: int
    logprob: float | None
    top: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Attributes:
        text: The new text; with ``echo``, the prompt and the new text.
        tokens: Its tokens; ``None`` if the server gave no log-probabilities.
        generated: The number of new tokens; ``None`` if the server does not count them.
    """

    text: str
    tokens: tuple[Token, ...] | None
    generated: int | None


def stand_in(text: str) -> int:
    """Return an id for a token of which only the spelling is known.

    It is a digest: the same in every process and for every model, and negative, so that no vocabulary has it.
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return -1 - (int.from_bytes(digest, "big") >> 1)


def read_completion(answer: Any) -> Completion:
    """Parse an answer.

    Raises:
        MalformedError: The answer does not have the form of a completion.
    """
    choices = _item(_typed(answer, dict, "the answer"), "choices", list)
    if not choices:
        raise MalformedError("'choices' is empty")
    choice = _typed(choices[0], dict, "the first of 'choices'")
    usage = answer.get("usage")
    generated = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Completion(
        text=_item(choice, "text", str),
        tokens=_tokens(choice.get("logprobs")),
        generated=generated if isinstance(generated, int) and generated >= 0 else None,
    )


def _tokens(logprobs: Any) -> tuple[Token, ...] | None:
    if logprobs is None:
        return None
    logprobs = _typed(logprobs, dict, "'logprobs'")
    if logprobs.get("content") is not None:
        return tuple(_from_entry(entry) for entry in _item(logprobs, "content", list))
    if logprobs.get("token_logprobs") is None:
        return None
    texts, values = _item(logprobs, "tokens", list), _item(logprobs, "token_logprobs", list)
    tops = _typed(logprobs.get("top_logprobs") or [None] * len(texts), list, "'top_logprobs'")
    if not len(texts) == len(values) == len(tops):
        raise MalformedError(
            f"there are {len(texts)} 'tokens', {len(values)} 'token_logprobs' and {len(tops)} 'top_logprobs'"
        )
    return tuple(_from_lists(*each) for each in zip(texts, values, tops, strict=True))


def _from_lists(text: Any, logprob: Any, top: Any) -> Token:
    text = _typed(text, str, "one of 'tokens'")
    candidates = [
        Candidate(_number_of(spelling), _nats(value, "one of 'top_logprobs'"), _spelled(spelling))
        for spelling, value in _typed(top or {}, dict, "one of 'top_logprobs'").items()
    ]
    return Token(
        text=text,
        token_id=_number_of(text),
        logprob=None if logprob is None else _nats(logprob, "one of 'token_logprobs'"),
        top=_descending(candidates),
    )


def _from_entry(entry: Any) -> Token:
    token_id, logprob, text = _identified(entry)
    top = _typed(entry.get("top_logprobs") or [], list, "'top_logprobs'")
    return Token(
        text=text or "",
        token_id=token_id,
        logprob=logprob,
        top=_descending([_identified(candidate) for candidate in top]),
    )


def _identified(entry: Any) -> Candidate:
    entry = _typed(entry, dict, "one of 'content'")
    logprob = _nats(entry.get("logprob"), "one of 'logprob'")
    if isinstance(entry.get("id"), int) and not isinstance(entry["id"], bool):
        text = entry.get("token")
        return Candidate(entry["id"], logprob, text if isinstance(text, str) else None)
    text = _item(entry, "token", str)
    return Candidate(_number_of(text), logprob, _spelled(text))


def _number_of(text: str) -> int:
    given = _TOKEN_ID.fullmatch(text)
    return int(given[1]) if given else stand_in(text)


def _spelled(text: str) -> str | None:
    return None if _TOKEN_ID.fullmatch(text) else text


def _descending(candidates: list[Candidate]) -> tuple[Candidate, ...]:
    return tuple(sorted(candidates, key=lambda each: (-each.logprob, each.token_id)))


def _nats(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedError(f"{where} is {shown(value, _LONGEST)}, not a number")
    if value > _ROUNDING:
        raise MalformedError(f"{where} is {value:g}, which is not the logarithm of a probability")
    return min(float(value), 0.0)  # NaN stays NaN: the model is broken, and the caller reports that


def _item(mapping: dict[str, Any], name: str, kind: type[T]) -> T:
    if name not in mapping:
        raise MalformedError(f"it has no {name!r}")
    return _typed(mapping[name], kind, repr(name))


def _typed(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind):
        raise MalformedError(f"{where} is {shown(value, _LONGEST)}, not a {kind.__name__}")
    return value


@dataclass(frozen=True, slots=True)
class Echo:
    """A text as a server tokenised it.

    Attributes:
        tokens: BOS, if the server adds one and shows it, then the text's tokens.
        bos: Whether the first token is that BOS.
        starts: The character at which each token begins; ``None`` if the spelling of the tokens does not tell.
    """

    tokens: tuple[Token, ...]
    bos: bool
    starts: tuple[int, ...] | None


def read_echo(text: str, completion: Completion) -> Echo | None:
    """Return the tokens of ``text``; ``None`` if they do not make up the text.

    Args:
        text: The prompt.
        completion: The answer, with log-probabilities, to a request for an echo and one more token.
    """
    tokens = completion.tokens or ()
    starts = _starts(text, tokens)
    if starts is not None:
        return Echo(tokens[: len(starts)], bos=_first_is_bos(text, tokens), starts=starts)
    generated = 1 if completion.generated is None else completion.generated
    own = tokens[: max(0, len(tokens) - generated)]
    if not own:
        return None
    if all(token.token_id >= 0 for token in own):  # ids can't be compared with the text, but there is nothing else
        return Echo(own, bos=False, starts=None)
    spelled, wanted = _skeleton("".join(token.text for token in own)), _skeleton(text)
    if spelled == wanted:
        return Echo(own, bos=False, starts=None)
    if own[0].logprob is None and spelled == _skeleton(own[0].text) + wanted:
        return Echo(own, bos=True, starts=None)
    return None


def _starts(text: str, tokens: Sequence[Token]) -> tuple[int, ...] | None:
    """The place at which each token of the text begins; later tokens were generated."""
    starts, at = [], 0
    for number, token in enumerate(tokens):
        if at == len(text):
            break
        starts.append(at)
        if number == 0 and _first_is_bos(text, tokens):
            continue
        if not text.startswith(token.text, at):
            return None
        at += len(token.text)
    return tuple(starts) if at == len(text) else None


def _first_is_bos(text: str, tokens: Sequence[Token]) -> bool:
    return bool(tokens) and tokens[0].logprob is None and not text.startswith(tokens[0].text)


def _skeleton(text: str) -> str:
    """The ASCII characters of a text without blanks: SentencePiece loses blanks, and split characters lose the rest."""
    return "".join(character for character in text if character.isascii() and not character.isspace())
