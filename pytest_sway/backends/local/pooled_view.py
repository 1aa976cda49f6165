"""`PooledView`: a view of a model in this process, which gives a test its own model and tokenizer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sway.backends.contract import ask_next_token
from pytest_sway.backends.text import chat
from pytest_sway.backends.text.tokens import token_texts
from pytest_sway.backends.view import BaseView, ViewOwner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_sway.protocols import Chat, Message, TokenDist

__tracebackhide__ = True


class OwnerOfModels(ViewOwner, Protocol):
    """What such a view needs of its backend besides answers."""

    def _model(self, view: Any) -> Any:
        """Return the model of the view's test, the same each time."""
        ...

    def _tokenizer(self, view: Any) -> Any:
        """Return the tokenizer of the view's test, the same each time."""
        ...


class PooledView(BaseView[OwnerOfModels]):
    """A view that also gives a test its own model and tokenizer."""

    @property
    def model(self) -> Any:
        """The test's own model, with exactly this view's adapter or none.

        It is made on first use, and stays the same while the view is open. It shares the base's memory and copies what
        you write to. So you may do anything to it: hooks, training, merging, gradients. Nothing of that reaches a
        view's answers, another view's model or another test.
        """
        return self._open()._model(self)

    @property
    def tokenizer(self) -> Any:
        """The test's own tokenizer, made on first use.

        Its settings are its own. Its vocabulary, normalizer, pre-tokenizer and post-processor are shared: a test that
        changes those, for example by adding tokens, gets a `MutationError`.
        """
        return self._open()._tokenizer(self)

    def _rendered(self, messages: Iterable[Message] | Chat) -> str:
        return str(self._run(_render, messages))

    def _with_texts(self, asked: Callable[[], list[TokenDist]]) -> list[TokenDist]:
        """Ask for distributions, which then can give the texts of their tokens, also after the view is closed."""
        decode = self._run(_decoder)  # first: the backend may be closed while it computes
        return [replace(dist, decode=decode) for dist in asked()]

    def _not_finite(self, label: str) -> str:
        """Return a sentence on what is not finite in an answer of this view; empty if all is."""
        return ask_next_token(self, label)


def _decoder(engine: Any) -> Callable[[Sequence[int]], list[str]]:
    return partial(token_texts, engine.tokenizer)


def _render(engine: Any, messages: Iterable[Message] | Chat) -> str:
    return chat.render(engine.tokenizer, messages)
