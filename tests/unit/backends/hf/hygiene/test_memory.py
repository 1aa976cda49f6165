"""What the heap does between two operations."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

MAPPED = """
import ctypes, sys, torch
from pytest_sway.backends.hf.hygiene.heap import reuse_freed_memory
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
heap = type("Heap", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_int) for name in fields]})
state = ctypes.CDLL(None).mallinfo
state.restype = heap
if sys.argv[1] == "kept":
    reuse_freed_memory()
before = state().hblkhd
tensor = torch.empty(16 * 2**20, dtype=torch.uint8)
print(state().hblkhd - before)
"""


def bytes_mapped(freed_memory: str) -> int:
    """Count those that glibc takes from outside of its heap for a tensor of 16 MiB, and so gives back after it."""
    command = [sys.executable, "-c", MAPPED, freed_memory]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_a_tensor_is_in_memory_that_the_next_one_uses_again() -> None:
    assert bytes_mapped("given back") >= 16 * 2**20
    assert bytes_mapped("kept") == 0
