"""Render conversations as text with the tokenizer's chat template."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.libraries.tokenizer_faults import template_place
from pytest_sway.backends.questions import checked_messages
from pytest_sway.errors import ScoringError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pytest_sway.protocols import Chat, Message, Prompt

__tracebackhide__ = True


_MOST_ADDED: Final = 2**20
"""The most characters that a template may add. Instructions and descriptions of tools take thousands."""

_PATIENCE: Final = 4.0
"""The most seconds that a template may take; usually it takes a millisecond."""

_END_OF_CONTENT: Final = "CONTINUE_FINAL_MESSAGE_TAG"
"""transformers appends this mark to a continued last message to cut the text there; it finds only one."""


def prompt_text(tokenizer: Any, prompt: Prompt) -> tuple[str, bool]:
    """Return a prompt as text, and whether a chat template made it.

    Raises:
        ScoringError: It is neither a text nor a list of messages, or the template refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt, False
    return render(tokenizer, prompt), True


def render(tokenizer: Any, messages: Iterable[Message] | Chat) -> str:
    """Return a conversation as the tokenizer's chat template renders it, up to where the answer goes on.

    The text ends where the assistant's turn begins. If the last message is the assistant's, the text ends after its
    content, so that the turn is continued. A `Chat` can say otherwise.

    Args:
        tokenizer: The tokenizer.
        messages: Mappings such as ``{"role": "user", "content": "Hello"}``, in order.

    Raises:
        ScoringError: The tokenizer has no template, a message is malformed, or the template refuses the messages or
            does not read an argument.
    """
    conversation, continues, opens, args = checked_messages(messages)
    if not getattr(tokenizer, "chat_template", None) and not args.get("chat_template"):
        raise ScoringError(
            "the tokenizer has no chat template, so messages cannot be rendered. Pass the prompt as text, or use the"
            " model's instruction-tuned variant."
        )
    place = partial(_place, tokenizer, args)
    how = {"continue_final_message": continues} if continues else {"add_generation_prompt": opens}
    how |= {"tokenize": False, **args}
    try:
        unread = _unread(tokenizer, args)
        text = str(_in_time(place, partial(tokenizer.apply_chat_template, conversation, **how)))
    except ScoringError:
        raise
    except Exception as error:  # a template is a program, and can raise anything
        roles = ", ".join(str(message["role"]) for message in conversation)
        given = f" and the arguments {', '.join(args)}" if args else ""
        raise ScoringError(
            f"the tokenizer's chat template refuses messages with the roles {roles}{given}:"
            f" {str(error)[:300].rstrip('.')}. The template is {place()}."
        ) from error
    if unread:
        raise ScoringError(
            f"the tokenizer's chat template does not read {', '.join(unread)}, so it would change nothing. Leave it"
            f" out, or check its spelling. The template is {place()}."
        )
    said = sum(len(str(each)) for each in (*conversation, *args.values()))
    if len(text) > _MOST_ADDED + 4 * said:
        raise ScoringError(
            f"the tokenizer's chat template renders messages of {said:,} characters as {len(text):,} characters, more"
            f" than any model reads. Fix the template ({place()})."
        )
    if continues and _END_OF_CONTENT in text and not any(_END_OF_CONTENT in str(each) for each in conversation):
        raise ScoringError(
            "the tokenizer's chat template prints the last message more than once, so the assistant's turn cannot be"
            " continued. End the messages with a user's, or fix the template"
            f" ({place()})."
        )
    return text


def _unread(tokenizer: Any, args: Mapping[str, Any]) -> list[str]:
    """Return the arguments whose names are nowhere in the template."""
    if not args:
        return []
    template = str(tokenizer.get_chat_template(args.get("chat_template"), args.get("tools")))
    words = {*re.findall(r"\w+", template), "chat_template"}
    return [name for name in args if name not in words]


def _place(tokenizer: Any, args: Mapping[str, Any]) -> str:
    """Return where the template is that a conversation was rendered with."""
    return "the argument chat_template" if args.get("chat_template") else template_place(tokenizer)


def _in_time(place: Callable[[], str], render: Callable[[], Any]) -> Any:
    """Run a template in a thread that can be abandoned: a template is a program, and may never end."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(render())
        except BaseException as error:  # raised in the caller
            outcome.set_exception(error)

    thread = Thread(target=run, name="chat template", daemon=True)
    thread.start()
    try:
        thread.join(_PATIENCE)
    finally:
        if not outcome.done():  # SystemExit ends the thread silently
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    if not outcome.done():
        raise ScoringError(
            f"the tokenizer's chat template takes more than {_PATIENCE:g} s. Fix the template ({place()})."
        )
    return outcome.result()
