"""The heap between two operations."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

MAPPED = """
import ctypes, sys, torch
from pytest_sway.backends.hf.hygiene.memory import reuse_freed_memory
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
heap = type("Heap", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_int) for name in fields]})
state = ctypes.CDLL(None).mallinfo
state.restype = heap
for prepare in (lambda: None, reuse_freed_memory):
    prepare()
    before = state().hblkhd
    tensor = torch.empty(16 * 2**20, dtype=torch.uint8)
    print(state().hblkhd - before)
    del tensor
"""
"""Prints the bytes that glibc maps outside its heap for a tensor of 16 MiB, and so frees after it."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_a_tensor_is_in_memory_that_the_next_one_uses_again() -> None:
    run = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, timeout=120, check=True)
    usually, then = map(int, run.stdout.split())
    assert usually >= 16 * 2**20
    assert then == 0
