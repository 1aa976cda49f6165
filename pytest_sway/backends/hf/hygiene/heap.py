"""Freed memory: given back to the machine, or kept for the next pass."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any, Final

__tracebackhide__ = True

_LARGEST_KEPT: Final = 20 * 2**20
"""Below what logits have that are made at once (`batches.Limits`). Kept, they would go the same way as all else: small
results take a place in their memory, the next ones do not fit in there, and peak memory is half as much again."""


def collect(device_type: str) -> None:
    """Free what nobody refers to any more, and give unused memory back, the accelerator's and the heap's."""
    import torch

    gc.collect()
    if device_type == "cuda":
        torch.cuda.empty_cache()
    elif device_type == "mps":
        torch.mps.empty_cache()
    trim_heap()


@cache
def reuse_freed_memory() -> None:
    """Have glibc keep what one operation of a pass frees for the next, but for what is very large.

    It maps whatever is over a threshold anew each time, and gives back what is free beyond twice as much: then all
    pages of every result are faulted in again. The threshold rises to the size of what was mapped and is freed, up to
    32 MiB (mallopt(3), M_MMAP_THRESHOLD). So memory that nobody touches is asked for and freed, once in a process.
    """
    import torch

    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


def trim_heap() -> None:
    """Have glibc give freed memory back.

    Of a base that was converted while loading, it keeps four fifths resident otherwise; of what a forward pass used,
    small results that lie in between keep the rest from being used for anything large.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
