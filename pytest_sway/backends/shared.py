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

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class _Slot(Generic[K, V]):
    """One value, its users, and the lock under which it is loaded and closed; once ``gone``, it stays so."""

    key: K
    users: int = 0
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
    _give_back: Callable[[], None] | None

    def release(self) -> None:
        """Give the claim up; the last one to go closes the value. Releasing twice is harmless."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


class SharedPool(Generic[K, V]):
    """Values by key, counted by their users.

    Args:
        close: Frees a value that has no users left.
    """

    def __init__(self, close: Callable[[V], None]) -> None:
        self._close = close
        self._lock = threading.Lock()
        self._slots: dict[K, _Slot[K, V]] = {}

    def acquire(self, key: K, load: Callable[[], V]) -> Share[V]:
        """Claim the value of ``key``, loading it if nobody has; others who ask meanwhile wait for that load.

        A load that raises is not remembered: the error goes up, and the next to ask tries again.
        """
        while True:
            slot = self._join(key)
            try:
                with slot.guard:
                    if slot.gone:  # it was being closed when we joined; by now its key is free
                        continue
                    fresh = slot.value is None
                    if slot.value is None:
                        slot.value = load()
                    return Share(slot.value, fresh, partial(self._leave, slot))
            except BaseException:
                self._leave(slot)
                raise

    @contextmanager
    def hold(self, key: K) -> Iterator[None]:
        """Keep the value of ``key`` from being closed inside the block, if it is loaded; load nothing."""
        with self._lock:
            slot = self._slots.get(key)
            if slot is not None and slot.gone:
                slot = None
            if slot is not None:
                slot.users += 1
        try:
            yield
        finally:
            if slot is not None:
                self._leave(slot)

    def withdraw(self, value: V) -> None:
        """Hand ``value`` out to nobody new; it is closed after its last user, and its key is loaded anew."""
        with self._lock:
            for key, slot in list(self._slots.items()):
                if slot.value is value:
                    del self._slots[key]

    def keys(self) -> list[K]:
        """The keys of what is loaded or loading."""
        with self._lock:
            return list(self._slots)

    def _join(self, key: K) -> _Slot[K, V]:
        with self._lock:
            slot = self._slots.setdefault(key, _Slot(key))
            slot.users += 1
            return slot

    def _leave(self, slot: _Slot[K, V]) -> None:
        with self._lock:
            slot.users -= 1
            if slot.users:
                return
        with slot.guard:
            with self._lock:
                if slot.users or slot.gone:  # somebody joined meanwhile, and will be the last to leave
                    return
                slot.gone = True
            value, slot.value = slot.value, None
            try:
                if value is not None:
                    self._close(value)
            finally:
                with self._lock:
                    if self._slots.get(slot.key) is slot:
                        del self._slots[slot.key]
