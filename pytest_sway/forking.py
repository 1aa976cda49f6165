"""Forks: a child must not wait for locks that nobody in it will free, nor close what its parent loaded."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable


def call_in_forked_child(method: Callable[[], None]) -> None:
    """Have every child that is forked from now on call a bound ``method``, as long as its object lives."""
    if not hasattr(os, "register_at_fork"):  # Windows does not fork
        return
    weak = weakref.WeakMethod(method)

    def in_child() -> None:
        alive = weak()
        if alive is not None:
            alive()

    os.register_at_fork(after_in_child=in_child)
