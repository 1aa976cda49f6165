"""What the heap does between two operations."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

TENSORS, BYTES = 4, 8 * 2**20

FAULTS = f"""
import resource, torch
from pytest_sway.backends.hf.memory import reuse_freed_memory
reuse_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    [torch.ones({BYTES} // 4) for _ in range({TENSORS})]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_what_one_operation_frees_the_next_one_uses() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120, check=True)
    once = TENSORS * BYTES // resource.getpagesize()
    assert int(done.stdout) < 2 * once, "page faults of 20 rounds, which need this memory one after the other"
