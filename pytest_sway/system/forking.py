"""Forks: a child must not wait for locks that nobody in it will free, nor close what its parent loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import MethodType
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

_methods: Final[WeakKeyDictionary[Any, Callable[[Any], None]]] = WeakKeyDictionary()
"""What a child calls, by object; one for the process, as are the handlers of `os`, which can't be taken back."""


def call_in_forked_child(method: Callable[[], None]) -> None:
    """Have every child that is forked from now on call a bound ``method``, one for each object, while that lives."""
    bound = cast("MethodType", method)
    _methods[bound.__self__] = bound.__func__


def _in_child() -> None:
    for owner, method in list(_methods.items()):
        method(owner)


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_in_child)
