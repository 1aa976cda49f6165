"""A reference model of the cache: one thread, lists, no locks, and none of the cache's code.

Names are as in `tests.unit.fakes.spec`: ``a+x`` is adapter x on base a.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

Size = dict[str, int] | None


class Refused(Exception):  # noqa: N818
    """No room."""


class Failed(Exception):  # noqa: N818
    """The load failed."""


class Interrupted(Exception):  # noqa: N818
    """An interrupt came."""


@dataclass(eq=False)
class Item:
    name: str
    size: Size
    leases: int = 0
    closes: int = 0


@dataclass
class Reference:
    max_size: int
    max_bytes: int | None
    ready: list[Item] = field(default_factory=list)
    retired: list[Item] = field(default_factory=list)
    built: list[Item] = field(default_factory=list)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)
    estimates: dict[str, Size] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)
    bases: set[str] = field(default_factory=set)
    base_loads: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    held_base: str = ""

    def acquire(self, name: str) -> Item:
        for item in self.ready:
            if item.name == name:
                self.ready.remove(item)
                self.ready.append(item)
                item.leases += 1
                self.counts["hits"] += 1
                return item
        if self._fault("check", name):
            self.counts["failures"] += 1
            raise Failed
        estimate = self.estimates[name]
        if estimate is not None and self.max_bytes is not None and sum(estimate.values()) > self.max_bytes:
            raise Refused
        base = name.partition("+")[0]
        self.held_base = base if base in self.bases else ""
        try:
            self._make_room(estimate)
            item = self._build(name, estimate)
        finally:
            self.held_base = ""
            self._drop_bases()
        size = self.sizes[name] if self.sizes[name] is not None else estimate
        if size is not None and self.max_bytes is not None and sum(size.values()) > self.max_bytes:
            self.counts["failures"] += 1
            self._close([item])
            raise Refused
        item.size, item.leases = size, 1
        self.ready.append(item)
        self.counts["loads"] += 1
        try:
            self._evict(self._idle_to_go(size, beside=item))
        except Interrupted:
            item.leases -= 1
            raise
        return item

    def release(self, item: Item | None) -> None:
        if item is not None:
            item.leases -= 1
        self._close([item for item in self.retired if not item.leases])

    def retire(self, items: Iterable[Item]) -> None:
        leaving = [item for item in self.ready if item in items and item.leases]
        going = [item for item in (*self.retired, *self.ready) if item in items and not item.leases]
        self.ready = [item for item in self.ready if item not in leaving]
        self.retired += leaving
        self._close(going)

    def residents(self) -> list[Item]:
        return [*self.retired, *self.ready]

    def _make_room(self, estimate: Size) -> None:
        going = self._idle_to_go(estimate, beside=None)
        if not self._fit([item for item in self.residents() if item not in going], estimate):
            raise Refused
        self._evict(going)

    def _build(self, name: str, estimate: Size) -> Item:
        fault = self._fault("load", name)
        if fault == "interrupt":
            raise Interrupted
        if fault:
            self.counts["failures"] += 1
            raise Failed
        item = Item(name, estimate)
        self.built.append(item)
        base = name.partition("+")[0]
        if base not in self.bases:
            self.bases.add(base)
            self.base_loads[base] += 1
        return item

    def _idle_to_go(self, size: Size, beside: Item | None) -> list[Item]:
        staying = [item for item in self.residents() if item is not beside]
        going = []
        for item in list(staying):
            if not self._fit(staying, size) and not item.leases:
                staying.remove(item)
                going.append(item)
        return going

    def _fit(self, staying: list[Item], newcomer: Size) -> bool:
        if len(staying) + 1 > self.max_size:
            return False
        if self.max_bytes is None or not staying:
            return True
        parts: dict[str, int] = {}
        for size in [*(item.size for item in staying), newcomer]:
            if size is None:
                return False
            for part, count in size.items():
                parts[part] = max(count, parts.get(part, 0))
        return sum(parts.values()) <= self.max_bytes

    def _evict(self, items: list[Item]) -> None:
        self.counts["evictions"] += len(items)
        self._close(items)

    def _close(self, items: list[Item]) -> None:
        for item in items:
            item.closes += 1
            for kept in (self.ready, self.retired):
                if item in kept:
                    kept.remove(item)
            self._drop_bases()
            fault = self._fault("close", item.name)
            if fault == "interrupt":
                raise Interrupted
            self.counts["close errors"] += bool(fault)

    def _drop_bases(self) -> None:
        used = {item.name.partition("+")[0] for item in self.built if not item.closes}
        self.bases &= used | {self.held_base}

    def _fault(self, where: str, name: str) -> str:
        return self.faults.pop((where, name), "")
