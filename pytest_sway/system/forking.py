"""Handlers for forked children, which must not wait for their parent's locks nor close its models."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import MethodType
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

_methods: Final[WeakKeyDictionary[Any, Callable[[Any], None]]] = WeakKeyDictionary()
"""The method that a child calls, by its object. It is global because handlers registered with `os` can't be removed."""


def call_in_forked_child(method: Callable[[], None]) -> None:
    """Register a bound ``method`` for every child forked from now on to call; one per object, while that lives."""
    bound = cast("MethodType", method)
    _methods[bound.__self__] = bound.__func__


def _in_child() -> None:
    for owner, method in list(_methods.items()):
        method(owner)


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_in_child)
