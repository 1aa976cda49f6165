"""Each worker's share of the processors, and its turn among the devices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_sway.system import machine
from pytest_sway.system.machine import WORKER_SLOT, threads_for, usable_processors, worker_slot


@pytest.fixture
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_processors", lambda: 8)


@pytest.fixture
def affinity_to_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)


@pytest.mark.usefixtures("eight_processors")
@pytest.mark.parametrize(("workers", "threads"), [(1, "8"), (2, "4"), (3, "2"), (8, "1"), (9, "1"), (100, "1")])
def test_workers_share_the_processors_and_each_has_one(workers: int, threads: str) -> None:
    assert threads_for(workers, {})["OMP_NUM_THREADS"] == threads


@pytest.mark.usefixtures("eight_processors")
def test_tokenizers_of_several_workers_use_one_thread_each() -> None:
    assert threads_for(2, {})["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.usefixtures("eight_processors")
@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_threads_that_the_user_has_chosen_stay(variable: str) -> None:
    assert threads_for(2, {variable: "3"}) == {"TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.usefixtures("eight_processors")
def test_what_the_user_has_chosen_for_tokenizers_stays() -> None:
    assert threads_for(2, {"TOKENIZERS_PARALLELISM": "true"}) == {"OMP_NUM_THREADS": "4"}


def test_the_processors_of_this_process_are_those_of_its_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7}, raising=False)
    assert usable_processors(tmp_path) == 3


@pytest.mark.usefixtures("affinity_to_eight")
@pytest.mark.parametrize(
    ("files", "processors"),
    [
        ({}, 8),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "nonsense"}, 8),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 4),
        (
            {
                "proc/self/cgroup": "1:name=systemd:/\n0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "500000 100000",
            },
            4,
        ),
    ],
)
def test_a_quota_of_a_control_group_or_of_one_above_it_counts(
    tmp_path: Path, files: dict[str, str], processors: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_processors(tmp_path) == processors


@pytest.mark.parametrize(("value", "slot"), [(None, 0), ("0", 0), ("3", 3), ("gw3", 0), ("", 0)])
def test_the_slot_is_the_workers_and_0_without_workers(
    monkeypatch: pytest.MonkeyPatch, value: str | None, slot: int
) -> None:
    if value is None:
        monkeypatch.delenv(WORKER_SLOT, raising=False)
    else:
        monkeypatch.setenv(WORKER_SLOT, value)
    assert worker_slot() == slot
