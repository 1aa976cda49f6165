"""Counts are added, merged, and sent as plain values."""

from __future__ import annotations

import json

import pytest

from pytest_sway.cache.stats import BackendStats, Event, EventLog, RecallStats, SwayStats


def _stats() -> SwayStats:
    stats = SwayStats(peak_resident=2, peak_bytes=300, close_errors=["c"], mutations=["m"], leaks=["l"])
    stats.import_seconds = 1.5
    stats.backend("a + x").add(BackendStats(loads=2, hits=5, failures=1, evictions=1, load_seconds=3.0, base="a"))
    stats.backend("b").add(BackendStats(loads=1, hits=1, load_seconds=2.0, base="b"))
    stats.base_loaded("a", 1.5)
    stats.base_loaded("b", 1.5)
    stats.base_recalled("b", 3, 0.25)
    return stats


def test_counts_of_a_backend_are_made_on_first_use_and_kept() -> None:
    stats = SwayStats()
    assert stats.backend("a") is stats.backend("a")
    assert stats.backends == {"a": BackendStats()}


def test_a_base_is_counted_with_each_of_its_loads() -> None:
    stats = _stats()
    stats.base_loaded("a", 0.5)
    assert stats.bases["a"] == BackendStats(loads=2, load_seconds=2.0)


def test_answers_from_memory_are_counted_with_the_seconds_that_they_saved() -> None:
    stats = _stats()
    stats.base_recalled("b", 2, 0.5)
    assert stats.recalled == {"b": RecallStats(answers=5, seconds=0.75)}


def test_the_total_is_over_all_backends_and_changes_none() -> None:
    stats = _stats()
    assert stats.total() == BackendStats(loads=3, hits=6, failures=1, evictions=1, load_seconds=5.0)
    assert stats == _stats()


def test_seconds_per_load_are_of_the_loads_that_succeeded() -> None:
    assert BackendStats(loads=2, failures=3, load_seconds=3.0).seconds_per_load == 1.5
    assert BackendStats(failures=3).seconds_per_load == 0.0


def test_saved_seconds_are_the_loads_that_hits_and_shared_bases_spared() -> None:
    """On a, two loads took 3.0 s and their base 1.5 s, so an adapter costs 0.75 s; on b, it costs 0.5 s."""
    assert _stats().saved_seconds() == pytest.approx(5 * (0.75 + 1.5) + 1 * 1.5 + 1 * (0.5 + 1.5))


def test_a_kind_without_shared_bases_saves_nothing_by_them() -> None:
    stats = SwayStats()
    stats.backend("base + one").add(BackendStats(loads=1, load_seconds=11.0, base="base"))
    stats.base_loaded("base", 10.0)
    stats.backend("custom:other").add(BackendStats(loads=5, load_seconds=0.5))
    assert stats.saved_seconds() == 0.0


def test_without_shared_bases_a_hit_saves_one_mean_load() -> None:
    stats = SwayStats()
    stats.backend("a").add(BackendStats(loads=2, hits=3, load_seconds=4.0))
    assert stats.saved_seconds() == pytest.approx(6.0)


def test_a_base_is_known_by_its_name_whatever_the_backends_label() -> None:
    stats = SwayStats()
    for adapter in ("one", "two"):
        stats.backend(f"mlx:a + {adapter}").add(BackendStats(loads=1, load_seconds=2.0, base="a"))
    stats.base_loaded("a", 3.0)
    assert stats.saved_seconds() == pytest.approx(3.0)


def test_nothing_is_saved_where_nothing_was_loaded() -> None:
    assert SwayStats().saved_seconds() == 0.0


def test_nothing_is_saved_where_each_load_was_used_once() -> None:
    stats = SwayStats()
    stats.backend("a").add(BackendStats(loads=1, load_seconds=4.0, base="a"))
    stats.base_loaded("a", 3.0)
    assert stats.saved_seconds() == 0.0


def test_merging_adds_counts_and_lines_and_keeps_the_larger_peak() -> None:
    stats = _stats()
    other = SwayStats(peak_resident=1, peak_bytes=400, close_errors=["c2"], leaks=["l2"])
    other.backend("b").add(BackendStats(loads=1, hits=2, load_seconds=1.0))
    other.backend("c").add(BackendStats(loads=1, load_seconds=1.0))
    other.base_loaded("b", 1.0)
    other.base_recalled("b", 1, 0.5)
    other.base_recalled("c", 2, 1.0)
    stats.merge(other)
    assert stats.backends == {
        "a + x": BackendStats(loads=2, hits=5, failures=1, evictions=1, load_seconds=3.0, base="a"),
        "b": BackendStats(loads=2, hits=3, load_seconds=3.0, base="b"),
        "c": BackendStats(loads=1, load_seconds=1.0),
    }
    assert stats.bases == {"a": BackendStats(loads=1, load_seconds=1.5), "b": BackendStats(loads=2, load_seconds=2.5)}
    assert stats.recalled == {"b": RecallStats(4, 0.75), "c": RecallStats(2, 1.0)}
    assert (stats.peak_resident, stats.peak_bytes) == (2, 400)
    assert (stats.close_errors, stats.mutations, stats.leaks) == (["c", "c2"], ["m"], ["l", "l2"])


def test_specs_of_one_name_are_all_kept() -> None:
    stats, other = SwayStats(), SwayStats()
    one, two, three = ({"fields": {"dtype": dtype}, "digest": None} for dtype in ("fp32", "bf16", "fp16"))
    for noted in (one, two, one):
        stats.note_spec("a", noted)
    other.note_spec("a", three)
    stats.merge(other)
    assert stats.specs == {"a": one, "a (2)": two, "a (3)": three}


def test_merging_leaves_the_other_alone() -> None:
    mine, theirs = SwayStats(), _stats()
    mine.merge(theirs)
    mine.merge(theirs)
    assert theirs == _stats()
    assert mine.backends["b"].loads == 2


def test_merging_into_nothing_is_a_copy() -> None:
    stats = SwayStats()
    stats.merge(_stats())
    assert stats == _stats()


def test_they_survive_json() -> None:
    sent = json.loads(json.dumps(_stats().as_dict()))
    assert SwayStats.from_dict(sent) == _stats()
    assert SwayStats.from_dict(SwayStats().as_dict()) == SwayStats()


def test_what_happened_when_survives_json_and_stays_its_processs_own() -> None:
    log = EventLog([Event(1.5, "load", "a", seconds=0.5, nbytes=8, resident=8), Event(2.0, "hit", "a", times=3)], 2)
    stats = SwayStats(
        log=log, specs={"a": {"fields": {}, "digest": None}}, versions={"torch": "2"}, devices={"cpu": "x"}
    )
    sent = SwayStats.from_dict(json.loads(json.dumps(stats.as_dict())))
    assert sent == stats
    total = SwayStats(versions={"torch": "1"})
    total.merge(sent)
    assert total.log == EventLog()
    assert (total.specs, total.versions, total.devices) == (
        {"a": {"fields": {}, "digest": None}},
        {"torch": "1"},
        {"cpu": "x"},
    )


def test_imports_are_summed_over_the_processes_and_no_part_of_what_was_saved() -> None:
    stats = SwayStats(import_seconds=7.0)
    stats.backend("a").add(BackendStats(loads=1, hits=9, load_seconds=1.0))
    stats.merge(SwayStats(import_seconds=5.0))
    assert stats.import_seconds == 12.0
    assert stats.saved_seconds() == pytest.approx(9.0)
