"""Check the arguments of a view's questions, the same for every kind of backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.errors import ScoringError
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from pytest_sway.protocols import Message, Prompt

__tracebackhide__ = True

_ASSISTANT: Final = "assistant"
_MANY: Final = " To ask many at once, use"


class SamplingParams(NamedTuple):
    """How new text is generated.

    Attributes:
        max_new_tokens: The most tokens to add.
        temperature: 0 takes the most probable token each time. Above 0, logits are divided by it before sampling.
        top_p: Sample from the smallest set of tokens with this mass.
    """

    max_new_tokens: int
    temperature: float
    top_p: float

    def check(self) -> None:
        """Raise `ScoringError` for an invalid value."""
        if self.max_new_tokens < 1:
            raise ScoringError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not self.temperature >= 0.0:
            raise ScoringError(f"temperature must be 0 or more, not {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ScoringError(f"top_p must be over 0 and at most 1, not {self.top_p}.")

    def room(self, max_length: int) -> int:
        """Return how many tokens of a prompt fit into a model that reads ``max_length`` at once.

        Raises:
            ScoringError: None do.
        """
        room = max_length - self.max_new_tokens
        if room < 1:
            raise ScoringError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt: the model reads at most"
                f" {max_length} tokens at once."
            )
        return room


def listed(items: Iterable[Any], what: str) -> list[Any]:
    """Return items as a list.

    Raises:
        ScoringError: ``items`` is a single text, or cannot be iterated over.
    """
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise ScoringError(f"expected a list of {what}; found {shown(items)}. Put a single one into a list.")
    return list(items)


def checked_pair(pair: Any) -> tuple[Prompt, str]:
    """Return a prompt and a completion.

    Raises:
        ScoringError: ``pair`` is something else.
    """
    sized = hasattr(pair, "__len__") and not isinstance(pair, str | bytes | Mapping)
    if not sized or len(pair) != 2 or not isinstance(pair[1], str):
        raise ScoringError(f"expected a pair of a prompt and a completion; found {shown(pair)}.")
    prompt, completion = pair
    return prompt, completion


def checked_text(text: Any) -> str:
    """Return a text.

    Raises:
        ScoringError: ``text`` is something else.
    """
    if not isinstance(text, str):
        many = f"{_MANY} rolling_logprobs(texts)." if isinstance(text, list | tuple) else ""
        raise ScoringError(f"expected a text to score; found {shown(text)}.{many}")
    return text


def whole(text: Any) -> Any:
    """Return what is given, if it is no text that holds half a character.

    Raises:
        ScoringError: It does.
    """
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!r} at position {error.start}"
            raise ScoringError(
                f"{shown(text)} holds half a character ({half}), which no tokenizer reads. Was the text cut within a"
                " character?"
            ) from None
    return text


def checked_messages(messages: Iterable[Message]) -> tuple[list[dict[str, Any]], bool]:
    """Return a conversation, and whether to continue its last turn, because that is the assistant's.

    An assistant's last turn without text is left out, since it has yet to begin.

    Raises:
        ScoringError: ``messages`` is not a conversation, or a message is malformed.
    """
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Iterable):
        raise ScoringError(
            f"expected a prompt: a text, or a list of messages with 'role' and 'content'; found {shown(messages)}."
        )
    messages = list(messages)
    if messages and all(isinstance(message, str) for message in messages):
        raise ScoringError(
            f"expected a prompt: one text, or a list of messages; found the texts {shown(messages)}.{_MANY}"
            " logprobs_of(pairs), next_token_dists(prompts) or generate_many(prompts)."
        )
    conversation = [_checked(message) for message in messages]
    if not conversation:
        raise ScoringError("the list of messages is empty; a conversation has at least one.")
    continues = conversation[-1]["role"] == _ASSISTANT
    if continues and not _has_text(conversation[-1]["content"]):
        conversation, continues = conversation[:-1], False  # the turn has no text to continue
        if not conversation:
            raise ScoringError("the only message is an assistant's without content; there is nothing to continue.")
    return conversation, continues


def seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Return one seed for each of ``count`` prompts.

    Raises:
        ScoringError: There are more or fewer seeds than prompts.
    """
    if not isinstance(seed, Sequence):
        return [seed] * count
    if len(seed) != count:
        raise ScoringError(f"there are {count} prompts and {len(seed)} seeds; pass one seed, or one for each prompt.")
    return list(seed)


def _has_text(content: Any) -> bool:
    """Whether a message has content; the template checks content that is not text."""
    return bool(content.strip()) if isinstance(content, str) else bool(content)


def _checked(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ScoringError(f"expected a message with 'role' and 'content'; found {shown(message)}.")
    whole(message["content"])
    return dict(message)
