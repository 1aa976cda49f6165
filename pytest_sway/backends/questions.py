"""Check the arguments of a view's questions, the same for every kind of backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.errors import ScoringError
from pytest_sway.protocols import Chat
from pytest_sway.system.wording import shown

if TYPE_CHECKING:
    from pytest_sway.protocols import Message, Prompt

__tracebackhide__ = True

_ASSISTANT: Final = "assistant"
_MANY: Final = " To ask many at once, use"

_HINTS: Final = {
    **dict.fromkeys(("max_tokens", "max_length", "max_gen_toks"), "max_new_tokens is the most tokens to add."),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until"), "stop=[...] takes the texts that end the new text."),
    **dict.fromkeys(
        ("tools", "documents", "enable_thinking", "add_generation_prompt", "continue_final_message", "chat_template"),
        "Chat(messages, ...) takes what is for the chat template, and is a prompt.",
    ),
    "do_sample": "temperature=0 takes the most probable token, and any other temperature samples.",
}
"""What replaces a keyword that other libraries have."""


_TOKENISING: Final = (
    *("conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
)
"""Parameters of ``apply_chat_template`` that are not about the text."""

_LISTS: Final = ("tools", "documents")

_SEEDS: Final = range(-(2**63), 2**64)
"""What torch takes."""


class SamplingParams(NamedTuple):
    """How new text is generated; `of` checks the values.

    Attributes:
        max_new_tokens: The most tokens to add.
        temperature: 0 takes the most probable token each time. Above 0, logits are divided by it before sampling.
        top_p: Sample from the smallest set of tokens with this mass.
        stop: Texts that end the new text, and do not belong to it.
        top_k: Sample from this many of the most probable tokens; 0 for all.
        min_p: Sample from the tokens at least this times as probable as the most probable one.
        repetition_penalty: Positive logits of tokens in the prompt and the new text are divided by it, others
            multiplied.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, *, stop: str | Iterable[str] | None, **numbers: Any) -> SamplingParams:
        """Return the settings with these values.

        Raises:
            ScoringError: A value is invalid.
        """
        for name, value in numbers.items():
            whole = name in ("max_new_tokens", "top_k")
            if not isinstance(value, Integral if whole else Real):
                raise ScoringError(f"{name} must be {'a whole number' if whole else 'a number'}, not {shown(value)}.")
            numbers[name] = int(value) if isinstance(value, Integral) and whole else float(value)
        made = cls(stop=_stop_texts(stop), **numbers)
        for name, valid, what in (
            ("max_new_tokens", made.max_new_tokens >= 1, "at least 1"),
            ("temperature", made.temperature >= 0.0, "0 or more"),
            ("top_p", 0.0 < made.top_p <= 1.0, "over 0 and at most 1"),
            ("top_k", made.top_k >= 0, "0 (all tokens) or more"),
            ("min_p", 0.0 <= made.min_p <= 1.0, "from 0 to 1"),
            ("repetition_penalty", 0.0 < made.repetition_penalty < math.inf, "over 0; 1 is none"),
        ):
            if not valid:
                raise ScoringError(f"{name} must be {what}, not {numbers[name]}.")
        return made

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


def checked_top_k(top_k: Any) -> int:
    """Return the number of tokens of a distribution.

    Raises:
        ScoringError: It is no whole number, or below 1.
    """
    if not isinstance(top_k, Integral):
        raise ScoringError(f"top_k must be a whole number, not {shown(top_k)}.")
    if top_k < 1:
        raise ScoringError(f"top_k must be at least 1, not {top_k}.")
    return int(top_k)


def until(text: str, stop: Iterable[str]) -> str:
    """Return a text up to the first of the stop texts in it."""
    return text[: min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))]


def refuse_unknown(call: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
    """Raise `TypeError` for keywords that a view's call does not have, and name those that it has."""
    if not unknown:
        return
    known = [name for name, each in signature(call).parameters.items() if each.kind is each.KEYWORD_ONLY]
    hints = "".join(f" {_HINTS[name]}" for name in unknown if name in _HINTS)
    raise TypeError(
        f"{call.__name__}() has no keyword {', '.join(map(repr, unknown))}; it has {', '.join(known)}.{hints} For other"
        " ways to generate, call the model's own in kind 'hf': view.model.generate(**view.tokenizer(prompt,"
        " return_tensors='pt'), ...)."
    )


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


def checked_text(text: Any, use: str = "score") -> str:
    """Return a text.

    Args:
        text: The text.
        use: What is done with it, in the error.

    Raises:
        ScoringError: ``text`` is something else.
    """
    if not isinstance(text, str):
        many = f"{_MANY} rolling_logprobs(texts)." if use == "score" and isinstance(text, list | tuple) else ""
        raise ScoringError(f"expected a text to {use}; found {shown(text)}.{many}")
    return text


def checked_input(text: Any) -> Any:
    """Return what a classifier reads: a text, a pair of texts as a tuple, or a conversation that is not continued.

    Raises:
        ScoringError: ``text`` is something else.
    """
    if isinstance(text, str):
        return text
    if isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return tuple(map(whole, text))
    if isinstance(text, list | tuple) and text and all(isinstance(part, str) for part in text):
        raise ScoringError(
            "expected a text to classify, a pair of texts as a tuple (text, other), or a list of messages; found"
            f" {shown(text)}."
        )
    chat = text if isinstance(text, Chat) else Chat(text)
    chat = Chat(
        chat.messages, **{"continue_final_message": False, "add_generation_prompt": False, **chat.template_args}
    )
    checked_messages(chat)
    return chat


def whole(text: Any) -> Any:
    """Return a text or other value, unless it is a text with half a character.

    Raises:
        ScoringError: It is one.
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


class Conversation(NamedTuple):
    """A checked conversation.

    Attributes:
        messages: Its turns.
        continues: Whether the last turn is continued, or the name of its field that is.
        opens: Whether the assistant's turn begins after the last one.
        template_args: Further arguments for the chat template.
    """

    messages: list[dict[str, Any]]
    continues: bool | str
    opens: bool
    template_args: dict[str, Any]


def checked_messages(prompt: Iterable[Message] | Chat) -> Conversation:
    """Return a conversation, and how it goes on.

    Unless the prompt says otherwise, its last turn is continued if that is the assistant's, and else the assistant's
    turn begins. An assistant's last turn without text is left out, since it has yet to begin.

    Raises:
        ScoringError: ``prompt`` is not a conversation, or a message or an argument is malformed.
    """
    args = _checked_args(prompt.template_args) if isinstance(prompt, Chat) else {}
    messages = prompt.messages if isinstance(prompt, Chat) else prompt
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Iterable):
        text = "" if isinstance(messages, str) else "prompt: a text, or a "
        raise ScoringError(f"expected a {text}list of messages with 'role' and 'content'; found {shown(messages)}.")
    messages = list(messages)
    if messages and all(isinstance(message, str) for message in messages):
        raise ScoringError(
            f"expected a prompt: one text, or a list of messages; found the texts {shown(messages)}.{_MANY}"
            " logprobs_of(pairs), next_token_dists(prompts) or generate_many(prompts)."
        )
    conversation = [_checked(message) for message in messages]
    if not conversation:
        raise ScoringError("the list of messages is empty; a conversation has at least one.")
    continues, opens = args.pop("continue_final_message", None), args.pop("add_generation_prompt", None)
    if continues and opens:
        raise ScoringError("continue_final_message and add_generation_prompt exclude each other; pass one of them.")
    if continues is None and opens is None:
        continues = conversation[-1]["role"] == _ASSISTANT
        if continues and conversation[-1].get("tool_calls"):
            continues, opens = False, False  # the turn is complete, and a tool's answer comes next
        elif continues and not _has_text(conversation[-1]["content"]):
            conversation, continues = conversation[:-1], False  # the turn has no text to continue
            if not conversation:
                raise ScoringError("the only message is an assistant's without content; there is nothing to continue.")
    return Conversation(conversation, continues or False, not continues if opens is None else bool(opens), args)


def seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Return one seed for each of ``count`` prompts.

    Raises:
        ScoringError: A seed is no whole number, or there are more or fewer seeds than prompts.
    """
    several = hasattr(seed, "__len__") and not isinstance(seed, str | bytes | Mapping)
    if not several:
        return [_seed(seed)] * count
    found = [_seed(each) for each in seed]  # type: ignore[union-attr] # it has a length
    if len(found) != count:
        raise ScoringError(f"there are {count} prompts and {len(found)} seeds; pass one seed, or one for each prompt.")
    return found


def _seed(value: Any) -> int:
    if not isinstance(value, Integral) or int(value) not in _SEEDS:
        raise ScoringError(f"a seed is a whole number of at most 64 bits; found {shown(value)}.")
    return int(value)


def _checked_args(args: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in args.items():
        if name in _TOKENISING:
            raise ScoringError(f"{name} is no argument for a chat template here: messages are rendered as text.")
        if name in _LISTS and value is not None and not isinstance(value, list | tuple):
            raise ScoringError(f"{name} must be a list, with one entry for each; found {shown(value)}.")
    return {name: value for name, value in args.items() if value or name not in _LISTS}  # none are nothing to read


def _stop_texts(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
        raise ScoringError(f"stop must be a text or a list of texts, not {shown(stop)}.")
    texts = tuple(texts)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ScoringError(f"each text of stop must be a text that is not empty, not {shown(text)}.")
    return tuple(dict.fromkeys(texts))


def _has_text(content: Any) -> bool:
    """Whether a message has content; the template checks content that is not text."""
    return bool(content.strip()) if isinstance(content, str) else bool(content)


def _checked(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        raise ScoringError(f"expected a message with 'role' and 'content'; found {shown(message)}.")
    whole(message.get("content"))
    return dict(message)
