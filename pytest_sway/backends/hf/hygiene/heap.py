"""Returns freed memory to the system, or keeps it for the next pass."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from typing import Any, Final

__tracebackhide__ = True

_LARGEST_KEPT: Final = 20 * 2**20
"""Bytes: less than a chunk of logits (`batching.Limits.logits_bytes`). Where glibc keeps those, too, the memory of
freed logits can be too small for the next by the few bytes that aligned memory takes. Peak memory then grows by a chunk
or two."""


def collect(device_type: str) -> None:
    """Collect garbage, and return unused memory of the accelerator and the heap."""
    gc.collect()
    return_memory(device_type)


def return_memory(device_type: str) -> None:
    """Return unused memory of the accelerator and the heap."""
    import torch

    if device_type == "cuda":
        torch.cuda.empty_cache()
    elif device_type == "mps":
        torch.mps.empty_cache()
    trim_heap()


@cache
def reuse_freed_memory() -> None:
    """Make glibc keep what one operation frees for the next, up to `_LARGEST_KEPT` bytes.

    By default glibc maps each block over a threshold by itself, and returns free memory beyond twice as much. Then each
    result faults in all of its pages again. The threshold rises to the size of a mapped block when that is freed, up to
    32 MiB (mallopt(3), M_MMAP_THRESHOLD). So this allocates and frees a block once per process. Other blocks, such as
    converted weights and the first logits, may raise it further. A fixed threshold would keep logits out of the heap,
    and cost 2% of the scoring of long texts.
    """
    import torch

    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


def trim_heap() -> None:
    """Make glibc return freed memory.

    Otherwise it keeps four fifths of a base that was converted while loading. After a forward pass, small results lie
    between free blocks, so that large ones find no room.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
