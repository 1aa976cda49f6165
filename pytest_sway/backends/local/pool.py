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

from pytest_sway.system.forking import call_in_forked_child
from pytest_sway.system.locking import atomic, holding

__tracebackhide__ = True

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class _Slot(Generic[K, V]):
    """One value.

    Attributes:
        key: Under which it is asked for.
        users: A token for each of its users, also of those who wait for it.
        value: The value itself, once it is loaded and until it is closed; a list, so that it is taken out once.
        gone: It is being closed, or was; it stays so.
        guard: The lock under which it is loaded and closed.
    """

    key: K
    users: set[object] = field(default_factory=set)
    value: list[V] = field(default_factory=list)
    gone: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True, eq=False)
class PoolLease(Generic[V]):
    """One user's claim on a shared value.

    Attributes:
        key: Under which it is shared.
        value: The shared value.
        fresh: Whether this claim was the one that loaded it.
    """

    key: Hashable
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
        self._start_empty()
        call_in_forked_child(self._forget_the_parents)

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[K, _Slot[K, V]] = {}
        self._withdrawn: list[_Slot[K, V]] = []

    def _forget_the_parents(self) -> None:
        """In a forked child: have nothing, wait for none of its parent's locks and close none of its values."""
        for slot in (*self._slots.values(), *self._withdrawn):
            slot.guard, slot.value = threading.Lock(), []
        self._start_empty()

    def acquire(self, key: K, load: Callable[[], V]) -> PoolLease[V]:
        """Claim the value of ``key``, loading it if nobody has; others who ask meanwhile wait for that load.

        A load that raises is not remembered: the error goes up, and the next to ask tries again.
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
        """Keep the value of ``key`` from being closed inside the block, if it is loaded; load nothing."""
        user = object()
        try:
            try:
                self._join_what_is_there(key, user)
                yield
            finally:
                self._leave_all(user)
        finally:
            self._leave_all(user)  # an interrupt may have struck in the line above

    @atomic
    def withdraw(self, value: V) -> None:
        """Hand ``value`` out to nobody new; it is closed after its last user, and its key is loaded anew."""
        for slot in [slot for slot in self._slots.values() if any(held is value for held in slot.value)]:
            self._withdrawn.append(slot)
            del self._slots[slot.key]

    @atomic
    def keys(self) -> list[K]:
        """The keys of what is loaded or loading."""
        return list(self._slots)

    # --- the steps: each is atomic, and can be repeated ---------------------------------------------------------------

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
        """Whether ``user`` was the last one there."""
        slot.users.discard(user)
        return not slot.users

    @atomic
    def _give_up(self, slot: _Slot[K, V]) -> bool:
        """Whether nobody joined meanwhile, who would then be the last to leave."""
        slot.gone = slot.gone or not slot.users
        return slot.gone

    @atomic
    def _remove(self, slot: _Slot[K, V]) -> None:
        if self._slots.get(slot.key) is slot:
            del self._slots[slot.key]
        if slot in self._withdrawn:
            self._withdrawn.remove(slot)

    # --- what is loaded and closed between them -----------------------------------------------------------------------

    def _share(self, slot: _Slot[K, V], user: object, load: Callable[[], V]) -> PoolLease[V] | None:
        """Under the slot's guard: its value, or ``None`` if it was being closed when we joined."""
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
        """Leave by the token, since an interrupt may have come before a slot was known."""
        for slot in self._of(user):
            self._leave(slot, user)

    def _close_unused(self, slot: _Slot[K, V]) -> None:
        if self._give_up(slot):
            self._finish(slot)

    def _finish(self, slot: _Slot[K, V]) -> None:
        try:
            while slot.value:
                self._close(slot.value.pop())
        finally:
            self._remove(slot)
