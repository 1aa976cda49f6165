"""`SharedPool`: values that are loaded once, used by many, and closed after their last user.

It holds the loaded bases, but knows nothing of models: loading and closing are functions that it is given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from pytest_sway.forking import call_in_forked_child

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class _Slot(Generic[K, V]):
    """One value, a token for each of its users, and the lock under which it is loaded and closed.

    Once ``gone``, it stays so.
    """

    key: K
    users: set[object] = field(default_factory=set)
    value: V | None = None
    gone: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True, eq=False)
class Share(Generic[V]):
    """One user's claim on a shared value.

    Attributes:
        value: The shared value.
        fresh: Whether this claim was the one that loaded it.
    """

    value: V
    fresh: bool
    _give_back: Callable[[], None]

    def release(self) -> None:
        """Give the claim up; the last one to go closes the value. Again, or from another thread, is harmless."""
        self._give_back()


class SharedPool(Generic[K, V]):
    """Values by key, counted by their users.

    Args:
        close: Frees a value that has no users left.
    """

    def __init__(self, close: Callable[[V], None]) -> None:
        self._close = close
        self._lock = threading.Lock()
        self._slots: dict[K, _Slot[K, V]] = {}
        call_in_forked_child(self._start_empty)

    def acquire(self, key: K, load: Callable[[], V]) -> Share[V]:
        """Claim the value of ``key``, loading it if nobody has; others who ask meanwhile wait for that load.

        A load that raises is not remembered: the error goes up, and the next to ask tries again.
        """
        user = object()
        try:
            while True:
                slot = self._join(key, user)
                with slot.guard:
                    if slot.gone:  # it was being closed when we joined
                        self._remove(slot)
                        continue
                    fresh = slot.value is None
                    if slot.value is None:
                        slot.value = load()
                    return Share(slot.value, fresh, partial(self._leave, slot, user))
        except BaseException:
            for slot in self._snapshot():  # by the token: an interrupt may have come before we knew our slot
                if user in slot.users:
                    self._leave(slot, user)
            raise

    @contextmanager
    def hold(self, key: K) -> Iterator[None]:
        """Keep the value of ``key`` from being closed inside the block, if it is loaded; load nothing."""
        user = object()
        with self._lock:
            slot = self._slots.get(key)
            if slot is not None and not slot.gone:
                slot.users.add(user)
        try:
            yield
        finally:
            if slot is not None:
                self._leave(slot, user)

    def withdraw(self, value: V) -> None:
        """Hand ``value`` out to nobody new; it is closed after its last user, and its key is loaded anew."""
        for slot in self._snapshot():
            if slot.value is value:
                self._remove(slot)

    def keys(self) -> list[K]:
        """The keys of what is loaded or loading."""
        return [slot.key for slot in self._snapshot()]

    def _start_empty(self) -> None:
        """Forget, in a forked child, what its parent loaded, without closing it."""
        for slot in self._slots.values():
            slot.gone = True
            slot.guard = threading.Lock()
        self._lock = threading.Lock()
        self._slots = {}

    def _snapshot(self) -> list[_Slot[K, V]]:
        with self._lock:
            return list(self._slots.values())

    def _join(self, key: K, user: object) -> _Slot[K, V]:
        with self._lock:
            slot = self._slots.setdefault(key, _Slot(key))
            slot.users.add(user)
            return slot

    def _leave(self, slot: _Slot[K, V], user: object) -> None:
        with self._lock:
            slot.users.discard(user)
            if slot.users or slot.gone:
                return
        with slot.guard:
            with self._lock:
                if slot.users or slot.gone:  # somebody joined meanwhile, and will be the last to leave
                    return
                slot.gone = True
            try:
                value, slot.value = slot.value, None
                if value is not None:
                    self._close(value)
            finally:
                self._remove(slot)

    def _remove(self, slot: _Slot[K, V]) -> None:
        with self._lock:
            if self._slots.get(slot.key) is slot:
                del self._slots[slot.key]
