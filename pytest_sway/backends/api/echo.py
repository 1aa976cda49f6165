"""Find a text's own tokens among those that a server echoes, and the place of each in the text.

Servers count differently: vLLM's offsets count the BOS that it puts in front, llama-cpp-python omits BOS, and none
spells a character that consists of several tokens. So the tokens are matched against the text itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_sway.backends.api.completions import Completion, Token


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
