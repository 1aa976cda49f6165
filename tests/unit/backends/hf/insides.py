"""Access to the private parts of backends and views, for tests that watch them or make them fail.

Other tests don't reach into privates. `view.model` belongs to the test; another model computes the view's answers.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.backends.hf.backend import HFBackend
    from pytest_sway.backends.hf.builder import HFBuilder
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.hf.model.bound_model import Adapter
    from pytest_sway.backends.hf.view import HFView
    from pytest_sway.backends.local.pooled_backend import Handed
    from pytest_sway.backends.local.tokenizer_copies import RustRecord

WAIT = 60.0
"""Seconds after which a test gives up waiting."""


def base_in(backend: HFBackend, number: int = 0) -> LoadedBase:
    """Return the base that the backend shares with others, or another model that it shares."""
    base: LoadedBase = backend._require().shares[number].value
    return base


def adapter_in(backend: HFBackend) -> Adapter:
    """Return the backend's adapter."""
    adapter: Adapter = backend._require().adapter
    return adapter


def tokenizer_in(backend: HFBackend) -> RustRecord | None:
    """Return the tokenizer of the backend's adapter, if it differs from the base's."""
    return backend._require().rust


def bases_in(builder: HFBuilder) -> list[Any]:
    """Return the keys of the loaded bases."""
    return builder._pool.keys()


def handed_to(view: HFView) -> Handed[Any]:
    """Return the objects that the view has given to its test."""
    backend: Any = view._open()
    handed: Handed[Any] = backend._handed(view)
    return handed


def engine_of(view: Any) -> Any:
    """Return the engine of the view's next call."""
    with handed_to(view).side.engine() as engine:
        return engine


def computing_model(view: Any) -> Any:
    """Return the Hugging Face model of the view's next call."""
    return engine_of(view).forward.model


def passes_of(view: Any) -> list[tuple[int, int]]:
    """Return a list that fills with the shapes of the inputs of the view's passes, in order."""
    shapes: list[tuple[int, int]] = []
    embeddings = computing_model(view).get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


@contextmanager
def held_up(view: Any) -> Iterator[threading.Event]:
    """Hold the view's next pass until the block ends; the event is set when the pass begins."""
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
