"""Collections are fewer while a model is loaded, and as before afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from pytest_sway.system.garbage import no_collections, no_full_collections


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Set small thresholds, and restore the collector's own settings."""
    before, enabled = gc.get_threshold(), gc.isenabled()
    gc.set_threshold(5, 2, 2)
    gc.enable()
    yield
    gc.set_threshold(*before)
    (gc.enable if enabled else gc.disable)()


def test_no_collection_is_full_within_and_thresholds_come_back() -> None:
    with suppress(ValueError), no_full_collections(), no_full_collections():
        young, _, full = gc.get_threshold()
        raise ValueError
    assert young == 5
    assert full > 10**6
    assert gc.get_threshold() == (5, 2, 2)


def test_thresholds_come_back_after_blocks_of_two_threads_that_overlap() -> None:
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(no_full_collections())
        second.enter_context(no_full_collections())
        first.close()
    assert gc.get_threshold() == (5, 2, 2)


def test_thresholds_that_an_imported_library_sets_stay() -> None:
    with no_full_collections():
        gc.set_threshold(50_000, 20, 20)
    assert gc.get_threshold() == (50_000, 20, 20)


def collected_after_a_load() -> list[int]:
    """Make as many objects as there are in a block, and a few after it.

    Returns:
        The generations that were collected after the block.
    """
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.collect()
    with no_full_collections():
        kept = [[] for _ in gc.get_objects()]  # type: ignore[var-annotated]
    gc.callbacks.append(note)
    try:
        kept += [[] for _ in range(12)]
    finally:
        gc.callbacks.remove(note)
    return generations


def test_the_full_collection_that_was_put_off_does_not_come_right_after() -> None:
    collected = collected_after_a_load()
    assert collected
    assert 2 not in collected
    assert not gc.get_freeze_count()


def test_what_a_user_froze_stays_frozen() -> None:
    frozen: list[int] = []
    gc.freeze()
    try:
        collected_after_a_load()
        # Not the number of frozen objects: it falls when one of them is deleted.
        assert all(known is not frozen for known in gc.get_objects())
    finally:
        gc.unfreeze()


def test_nothing_is_collected_within_and_collections_come_back() -> None:
    with suppress(ValueError), no_collections(), no_collections():
        enabled = gc.isenabled()
        raise ValueError
    assert not enabled
    assert gc.isenabled()


def test_collections_that_a_user_has_turned_off_stay_off() -> None:
    gc.disable()
    with no_collections():
        pass
    assert not gc.isenabled()
