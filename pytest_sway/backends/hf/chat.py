"""Prompts that are conversations: from messages to the text that the tokenizer's chat template makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.errors import ScoringError

if TYPE_CHECKING:
    from pytest_sway.scoring import Message, Prompt

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


_ASSISTANT: Final = "assistant"
_MOST_ADDED: Final = 2**20
"""Characters that a template adds of its own: instructions and descriptions of tools take thousands."""


def prompt_text(tokenizer: Any, prompt: Prompt) -> tuple[str, bool]:
    """Return a prompt as text, and whether a chat template made it.

    Raises:
        ScoringError: It is neither a text nor a list of messages, or the template refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt, False
    return render(tokenizer, prompt), True


def render(tokenizer: Any, messages: Iterable[Message]) -> str:
    """Return what the tokenizer's chat template makes of a conversation, up to where the answer goes on.

    That is where the assistant's turn begins; or, where the last message is the assistant's, where its content ends, so
    that this turn is continued.

    Args:
        tokenizer: The tokenizer.
        messages: Mappings such as ``{"role": "user", "content": "Hello"}``, in order.

    Raises:
        ScoringError: The tokenizer has no template, a message is malformed, or the template refuses them.
    """
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Iterable):
        raise ScoringError(
            f"a prompt is a text or a list of messages with 'role' and 'content', and {shortened(messages)} is neither."
        )
    conversation = [_checked(message) for message in messages]
    if not conversation:
        raise ScoringError("the list of messages is empty; a conversation has at least one.")
    if not getattr(tokenizer, "chat_template", None):
        raise ScoringError(
            "the tokenizer has no chat template, so messages cannot be rendered. Pass the prompt as text, or use the"
            " model's instruction-tuned variant."
        )
    continues = conversation[-1]["role"] == _ASSISTANT
    if continues and not _has_text(conversation[-1]["content"]):
        conversation, continues = conversation[:-1], False  # there is nothing yet after which the turn goes on
        if not conversation:
            raise ScoringError("the only message is an assistant's without content; there is nothing to continue.")
    how = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False, **how))
    except Exception as error:  # a template is a program, and can raise anything
        roles = ", ".join(str(message["role"]) for message in conversation)
        raise ScoringError(f"the tokenizer's chat template refuses messages with the roles {roles}: {error}") from error
    said = sum(len(str(message)) for message in conversation)
    if len(text) > _MOST_ADDED + 4 * said:
        raise ScoringError(
            f"the tokenizer's chat template makes {len(text):,} characters of messages of {said:,}, which no model"
            " reads. Mend the template (chat_template.jinja, or chat_template in tokenizer_config.json)."
        )
    return text


def _has_text(content: Any) -> bool:
    """Whether a message says anything; other content than text is left to the template."""
    return bool(content.strip()) if isinstance(content, str) else bool(content)


def _checked(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ScoringError(f"a message is a mapping with 'role' and 'content', and {shortened(message)} is not.")
    return dict(message)


def shortened(value: object) -> str:
    """Return the ``repr`` of a value, cut to a length that fits into an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
