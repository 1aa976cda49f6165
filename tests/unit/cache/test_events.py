"""The log of what happened when: loads, failures, hits, evictions and closes, with what is resident after each."""

from __future__ import annotations

import json

import pytest

from pytest_sway.cache.backend_cache import BackendCache
from tests.unit.fakes import FakeBuild, InformedFakeBuild, spec


def events(cache: BackendCache) -> list[tuple[str, str]]:
    return [(event.event, event.spec.removeprefix("dummy:org/")) for event in cache.stats.log.events]


def test_a_swap_of_adapters_counts_the_bytes_of_their_base_once(sharing: InformedFakeBuild) -> None:
    cache = BackendCache(max_size=2, build=sharing)
    for name in ("a+x", "a+y", "b"):
        cache.get_or_load(spec(name))
    cache.shutdown()
    found = [(event.event, event.nbytes, event.resident) for event in cache.stats.log.events]
    assert found == [
        ("load", 110, 110),
        ("load", 110, 120),
        ("evict", 110, 120),
        ("close", 110, 110),
        ("load", 100, 210),
        ("close", 110, 100),
        ("close", 100, 0),
    ]


def test_hits_come_before_what_happened_after_them(build: FakeBuild) -> None:
    cache = BackendCache(max_size=1, build=build)
    for name in "aaab":
        cache.get_or_load(spec(name))
    assert events(cache) == [("load", "a"), ("hit", "a"), ("evict", "a"), ("close", "a"), ("load", "b")]
    assert [event.times for event in cache.stats.log.events] == [1, 2, 1, 1, 1]
    cache.get_or_load(spec("b"))
    cache.note_hits()
    cache.note_hits()
    assert events(cache)[5:] == [("hit", "b")]


def test_a_load_that_fails_is_one(sharing: InformedFakeBuild) -> None:
    sharing.check_errors["a"].append(OSError("disk on fire"))
    cache = BackendCache(build=sharing)
    with pytest.raises(Exception, match="disk on fire"):
        cache.get_or_load(spec("a"))
    assert events(cache) == [("failure", "a")]


def test_what_has_no_known_size_has_no_bytes(build: FakeBuild) -> None:
    cache = BackendCache(build=build)
    cache.get_or_load(spec("a"))
    (load,) = cache.stats.log.events
    assert (load.nbytes, load.resident) == (None, None)
    assert load.seconds is not None
    json.dumps(cache.stats.as_dict())
