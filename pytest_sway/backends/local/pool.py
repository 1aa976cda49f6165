"""`SharedPool`: values that are loaded once, shared, and closed after their last user.

It holds the loaded bases, but knows nothing of models: its callers pass functions that load and close.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from pytest_sway.system.locking import atomic, call_in_forked_child, close_all, holding

__tracebackhide__ = True

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class _Slot(Generic[K, V]):
    """A value and its users.

    Attributes:
        key: The value's key.
        users: A token for each user, including those that wait for the value.
        value: The value from its load to its close; a list, see `close_all`.
        gone: Whether its close has begun; it never becomes false again.
        guard: The lock for its load and its close.
    """

    key: K
    users: set[object] = field(default_factory=set)
    value: list[V] = field(default_factory=list)
    gone: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True, eq=False)
class PoolLease(Generic[V]):
    """A user's claim on a shared value.

    Attributes:
        key: The value's key.
        value: The shared value.
        fresh: Whether this claim loaded it.
    """

    key: Hashable
    value: V
    fresh: bool
    _give_back: Callable[[], None]

    def release(self) -> None:
        """Give up the claim; the last one closes the value. It may be called again, and from any thread."""
        self._give_back()


class SharedPool(Generic[K, V]):
    """Values by key, counted by their users.

    Args:
        close: Frees a value that has no users left.
    """

    def __init__(self, close: Callable[[V], None]) -> None:
        self._close = close
        self._start_empty()
        call_in_forked_child(self._forget_the_parents)

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[K, _Slot[K, V]] = {}
        self._withdrawn: list[_Slot[K, V]] = []

    def _forget_the_parents(self) -> None:
        """Empty the pool in a forked child: wait for none of the parent's locks, and close none of its values."""
        for slot in (*self._slots.values(), *self._withdrawn):
            slot.guard, slot.value = threading.Lock(), []
        self._start_empty()

    def acquire(self, key: K, load: Callable[[], V]) -> PoolLease[V]:
        """Claim the value of ``key``. Load it if it is not loaded; others who ask meanwhile wait for that load.

        An error of a load is raised and not stored: the next caller tries again.
        """
        user = object()
        try:
            share = None
            while share is None:
                slot = self._join(key, user)
                share = holding(slot.guard, partial(self._share, slot, user, load))
            return share
        except BaseException:
            self._leave_all(user)
            raise

    @contextmanager
    def pin(self, key: K) -> Iterator[None]:
        """Keep the value of ``key`` from being closed inside the block if it is loaded. Load nothing."""
        user = object()
        try:
            try:
                self._join_what_is_there(key, user)
                yield
            finally:
                self._leave_all(user)
        finally:
            self._leave_all(user)  # an interrupt may have cut off the line above

    @atomic
    def withdraw(self, value: V) -> None:
        """Give ``value`` to no new user. It is closed after its last user, and its key is loaded anew."""
        for slot in [slot for slot in self._slots.values() if any(held is value for held in slot.value)]:
            self._withdrawn.append(slot)
            del self._slots[slot.key]

    @atomic
    def keys(self) -> list[K]:
        """Return the keys of all values that are loaded or loading."""
        return list(self._slots)

    # --- steps: each is atomic and can be repeated --------------------------------------------------------------------

    @atomic
    def _join(self, key: K, user: object) -> _Slot[K, V]:
        slot = self._slots.setdefault(key, _Slot(key))
        slot.users.add(user)
        return slot

    @atomic
    def _join_what_is_there(self, key: K, user: object) -> None:
        slot = self._slots.get(key)
        if slot is not None and not slot.gone:
            slot.users.add(user)

    @atomic
    def _of(self, user: object) -> list[_Slot[K, V]]:
        return [slot for slot in (*self._slots.values(), *self._withdrawn) if user in slot.users]

    @atomic
    def _depart(self, slot: _Slot[K, V], user: object) -> bool:
        """Remove ``user``; return whether it was the last."""
        slot.users.discard(user)
        return not slot.users

    @atomic
    def _give_up(self, slot: _Slot[K, V]) -> bool:
        """Mark the slot as gone unless a user has joined, who will then close it; return whether it is gone."""
        slot.gone = slot.gone or not slot.users
        return slot.gone

    @atomic
    def _remove(self, slot: _Slot[K, V]) -> None:
        """Remove a slot, unless an interrupt came before the end of its close: the next user or release repeats it."""
        if slot.value:
            return
        if self._slots.get(slot.key) is slot:
            del self._slots[slot.key]
        if slot in self._withdrawn:
            self._withdrawn.remove(slot)

    # --- loads and closes, between the steps --------------------------------------------------------------------------

    def _share(self, slot: _Slot[K, V], user: object, load: Callable[[], V]) -> PoolLease[V] | None:
        """Return a claim, under the slot's guard; ``None`` if the slot was being closed when we joined."""
        if slot.gone:
            self._finish(slot)
            return None
        fresh = not slot.value
        if fresh:
            slot.value.append(load())
        return PoolLease(slot.key, slot.value[0], fresh, partial(self._leave, slot, user))

    def _leave(self, slot: _Slot[K, V], user: object) -> None:
        if self._depart(slot, user):
            holding(slot.guard, partial(self._close_unused, slot))

    def _leave_all(self, user: object) -> None:
        """Leave all slots by the token, since an interrupt may have come before the slot was known."""
        for slot in self._of(user):
            self._leave(slot, user)

    def _close_unused(self, slot: _Slot[K, V]) -> None:
        if self._give_up(slot):
            self._finish(slot)

    def _finish(self, slot: _Slot[K, V]) -> None:
        try:
            close_all(slot.value, self._close)
        finally:
            self._remove(slot)
