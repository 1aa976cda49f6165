"""Tell whether an error means that memory ran out, for every kind, without importing a library."""

from __future__ import annotations

import errno
import re
import sys
from typing import Final

from pytest_sway.errors import SwayError

_SAYINGS: Final = re.compile(
    r"out of memory|out_of_memory|(can't|cannot|unable to|failed to|attempting to) allocate|not enough memory"
    r"|insufficient memory|bad_alloc|alloc_failed|resource_exhausted",
    re.IGNORECASE,
)
"""What torch, MLX, CUDA's libraries and the C library say, mostly in a plain RuntimeError."""
_TELLERS: Final = ("RuntimeError", "SafetensorError", "AcceleratorError")
"""The classes whose text counts. In others, such as a ValueError, the words mean something else."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, SwayError):
        return False
    torchs = getattr(sys.modules.get("torch"), "OutOfMemoryError", None)
    if isinstance(torchs, type) and isinstance(error, torchs):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = any(base.__name__ in _TELLERS for base in type(error).__mro__)
    return told and bool(_SAYINGS.search(str(error)))
