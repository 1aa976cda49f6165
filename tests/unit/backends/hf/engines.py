"""What computes a view's answers, for tests that watch it or have it fail; `view.model` is the test's own."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT = 60.0
"""Seconds after which a test gives up on what should have happened long ago."""


def engine_of(view: Any) -> Any:
    """The engine that the view's next call will use."""
    with view._backend._handed(view).side.engine() as engine:
        return engine


def computing_model(view: Any) -> Any:
    """The Hugging Face model that the view's next call will compute with."""
    return engine_of(view).forward.model


def passes_of(view: Any) -> list[tuple[int, int]]:
    """The shapes of what the view's model will embed, in order, filled as it computes."""
    shapes: list[tuple[int, int]] = []
    embeddings = computing_model(view).get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


@contextmanager
def held_up(view: Any) -> Iterator[threading.Event]:
    """Have the view's next pass wait until the block is left; the event is set once it has begun."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        begun.set()
        assert go_on.wait(WAIT)

    handle = computing_model(view).get_input_embeddings().register_forward_pre_hook(wait)
    try:
        yield begun
    finally:
        handle.remove()
        go_on.set()
