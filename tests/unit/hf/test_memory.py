"""What the heap does between two operations."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from pytest_sway.backends.hf.memory import reuse_freed_memory
if sys.argv[1] == "kept":
    reuse_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    [torch.ones(2**21) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(freed_memory: str) -> int:
    """Count those of 20 rounds that all need the same 32 MiB, in a process of their own."""
    command = [sys.executable, "-c", FAULTS, freed_memory]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_what_one_operation_frees_the_next_one_uses() -> None:
    assert page_faults("kept") < page_faults("given back") / 2
