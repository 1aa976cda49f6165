"""What may be asked of a view: the same for every kind, so that a test can move from one to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.errors import ScoringError

if TYPE_CHECKING:
    from pytest_sway.protocols import Message, Prompt

__tracebackhide__ = True

_ASSISTANT: Final = "assistant"
_MANY: Final = " To ask many at once, use"


class SamplingParams(NamedTuple):
    """How new text is made.

    Attributes:
        max_new_tokens: The most tokens to add.
        temperature: 0 for the most probable token each time; above, logits are divided by it and sampled from.
        top_p: Sample from the smallest set of tokens with this mass.
    """

    max_new_tokens: int
    temperature: float
    top_p: float

    def check(self) -> None:
        """Raise `ScoringError` for a value that has no meaning."""
        if self.max_new_tokens < 1:
            raise ScoringError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if not self.temperature >= 0.0:
            raise ScoringError(f"temperature must be 0 or more, not {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ScoringError(f"top_p must be over 0 and at most 1, not {self.top_p}.")

    def room(self, max_length: int) -> int:
        """Return how many tokens a prompt may have, for a model that reads ``max_length`` at once.

        Raises:
            ScoringError: None.
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
        ScoringError: They are one text, or nothing to iterate over.
    """
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise ScoringError(
            f"expected a list of {what}, and {shortened(items)} is none. For a single one, put it in []."
        )
    return list(items)


def checked_pair(pair: Any) -> tuple[Prompt, str]:
    """Return a prompt and a completion.

    Raises:
        ScoringError: They are no pair.
    """
    sized = hasattr(pair, "__len__") and not isinstance(pair, str | bytes | Mapping)
    if not sized or len(pair) != 2 or not isinstance(pair[1], str):
        raise ScoringError(f"a pair is a prompt and a completion, and {shortened(pair)} is none.")
    prompt, completion = pair
    return prompt, completion


def checked_text(text: Any) -> str:
    """Return a text.

    Raises:
        ScoringError: It is none.
    """
    if not isinstance(text, str):
        many = f"{_MANY} rolling_logprobs(texts)." if isinstance(text, list | tuple) else ""
        raise ScoringError(f"expected a text to score, and {shortened(text)} is none.{many}")
    return text


def checked_messages(messages: Iterable[Message]) -> tuple[list[dict[str, Any]], bool]:
    """Return a conversation, and whether its last turn is the assistant's and goes on.

    A last turn of the assistant's without text is left out: it is one that has yet to begin.

    Raises:
        ScoringError: It is none, or a message is malformed.
    """
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Iterable):
        raise ScoringError(
            f"a prompt is a text or a list of messages with 'role' and 'content', and {shortened(messages)} is neither."
        )
    messages = list(messages)
    if messages and all(isinstance(message, str) for message in messages):
        raise ScoringError(
            f"a prompt is one text or a list of messages, and {shortened(messages)} is a list of texts.{_MANY}"
            " logprobs_of(pairs), next_token_dists(prompts) or generate_many(prompts)."
        )
    conversation = [_checked(message) for message in messages]
    if not conversation:
        raise ScoringError("the list of messages is empty; a conversation has at least one.")
    continues = conversation[-1]["role"] == _ASSISTANT
    if continues and not _has_text(conversation[-1]["content"]):
        conversation, continues = conversation[:-1], False  # there is nothing yet after which the turn goes on
        if not conversation:
            raise ScoringError("the only message is an assistant's without content; there is nothing to continue.")
    return conversation, continues


def seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Return one seed for each of ``count`` prompts.

    Raises:
        ScoringError: Seeds were given, and not one for each prompt.
    """
    if not isinstance(seed, Sequence):
        return [seed] * count
    if len(seed) != count:
        raise ScoringError(f"there are {count} prompts and {len(seed)} seeds; pass one seed, or one for each prompt.")
    return list(seed)


def shortened(value: object) -> str:
    """Return the ``repr`` of a value, cut to a length that fits into an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _has_text(content: Any) -> bool:
    """Whether a message says anything; other content than text is left to the template."""
    return bool(content.strip()) if isinstance(content, str) else bool(content)


def _checked(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ScoringError(f"a message is a mapping with 'role' and 'content', and {shortened(message)} is not.")
    return dict(message)
