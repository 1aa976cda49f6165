"""What fits beside what is resident, and who has to go: arithmetic, no locks and no loading."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_sway.cache.entries import Entry, SizeByPart
from pytest_sway.system.wording import format_bytes

if TYPE_CHECKING:
    pass

__tracebackhide__ = True


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be resident at one time.

    Attributes:
        max_size: Backends, at least 1.
        max_bytes: Bytes of weights, or ``None`` for no bound.
    """

    max_size: int
    max_bytes: int | None

    def allows(self, entries: Iterable[Entry]) -> bool:
        """Whether these may be resident together; one of unknown size takes up all the bytes."""
        together = list(entries)
        if len(together) > self.max_size:
            return False
        if self.max_bytes is None or len(together) <= 1:
            return True
        total = total_bytes(together)
        return total is not None and total <= self.max_bytes

    def victims(self, residents: Iterable[Entry], newcomer: Entry) -> list[Entry] | None:
        """The idle entries to close so that ``newcomer`` fits, least recently used first; ``None`` if it cannot fit.

        Args:
            residents: What is resident, least recently used first.
            newcomer: What is to be loaded, with its estimated parts.
        """
        oldest_idle, fits = self._oldest_idle(residents, newcomer)
        return oldest_idle if fits else None

    def surplus(self, residents: Iterable[Entry], newest: Entry) -> list[Entry]:
        """The idle entries to close because ``newest`` turned out larger than was estimated."""
        return self._oldest_idle([entry for entry in residents if entry is not newest], newest)[0]

    def _oldest_idle(self, residents: Iterable[Entry], newcomer: Entry) -> tuple[list[Entry], bool]:
        """The idle entries without which ``newcomer`` fits, or all of them; and whether it fits then."""
        staying = list(residents)
        victims: list[Entry] = []
        for entry in [entry for entry in staying if entry.idle]:
            if self.allows([*staying, newcomer]):
                break
            staying.remove(entry)
            victims.append(entry)
        return victims, self.allows([*staying, newcomer])


def total_bytes(entries: Iterable[Entry]) -> int | None:
    """The bytes of these together, each part counted once; ``None`` if one's size is unknown."""
    parts: dict[Hashable, int] = {}
    for entry in entries:
        if entry.parts is None:
            return None
        for part, size in entry.parts.items():
            parts[part] = max(size, parts.get(part, 0))
    return sum(parts.values())


def format_parts(parts: SizeByPart | None) -> str:
    """The size of something for people, where it is known."""
    return "an unknown size" if parts is None else format_bytes(sum(parts.values()))
