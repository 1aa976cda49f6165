"""A broken file gives PEFT's answer, or in time an error that names the file and the field.

A failure shows the seed and number of its input: ``broken(kind, seed, number, arena.files)`` makes it again.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.unit.backends.hf.fuzz.arena import Arena
from tests.unit.backends.hf.fuzz.inputs import KINDS, broken
from tests.unit.backends.hf.fuzz.profiles import PROFILE, SEED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what an input allocates is bounded on Linux alone")

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENOUGH = 10
"""The number of failures after which the test stops."""


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = Arena(tmp_path_factory.mktemp("arena"), PROFILE.adapters)
    yield arena
    arena.close()


@pytest.mark.filterwarnings("ignore:the adapter_config.json of .* has fields that:pytest_sway.SwayWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_served_as_by_peft_or_named(arena: Arena, kind: str) -> None:
    failures: list[str] = []
    for number in range(PROFILE.inputs[kind]):
        tried = broken(kind, SEED, number, arena.files)
        complaint = arena.complaint(tried)
        if complaint is not None:
            failures.append(f"seed {SEED}, input {number}, {tried}\n    {complaint}")
        if len(failures) == _ENOUGH:
            break
    assert not failures, f"{len(failures)} of {number + 1} inputs of the kind {kind} failed:\n" + "\n".join(failures)
