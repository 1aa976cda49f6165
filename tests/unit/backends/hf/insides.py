"""What backends and views keep to themselves, for tests that watch it or have it fail: the one place that reaches in.

`view.model` is the test's own, and not what computes a view's answers.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.backends.hf.backend import HFBackend
    from pytest_sway.backends.hf.builder import HFBuilder
    from pytest_sway.backends.hf.model.adapter import Adapter
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.hf.view import HFView
    from pytest_sway.backends.local.pooled_backend import Handed
    from pytest_sway.backends.local.tokenizer_copies import RustRecord

WAIT = 60.0
"""Seconds after which a test gives up on what should have happened long ago."""


def base_in(backend: HFBackend) -> LoadedBase:
    """The base that the backend shares with others."""
    base: LoadedBase = backend._require().shares[0].value
    return base


def adapter_in(backend: HFBackend) -> Adapter:
    """The adapter that the backend has put on its base."""
    adapter: Adapter = backend._require().adapter
    return adapter


def tokenizer_in(backend: HFBackend) -> RustRecord | None:
    """The tokenizer that the backend's adapter brings, where that is not the base's."""
    return backend._require().rust


def bases_in(builder: HFBuilder) -> list[Any]:
    """The keys of the bases that are loaded."""
    return builder._pool.keys()


def handed_to(view: HFView) -> Handed[Any]:
    """What the view has handed to its test so far."""
    return view._open()._handed(view)


def engine_of(view: Any) -> Any:
    """The engine that the view's next call will use."""
    with handed_to(view).side.engine() as engine:
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
