"""The bounds of a cache: which entries fit together, which to evict, and when waiting is vain. It does not lock."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from pytest_sway.cache.entries import Entry, Operation, SizeByPart
from pytest_sway.system.wording import format_bytes

__tracebackhide__ = True


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be resident at one time.

    Attributes:
        max_size: Number of backends, at least 1.
        max_bytes: Bytes of weights, or ``None`` for no bound.
    """

    max_size: int
    max_bytes: int | None

    def allows(self, entries: Iterable[Entry]) -> bool:
        """Whether ``entries`` may be resident together; an entry of unknown size counts as the whole byte budget."""
        together = list(entries)
        if len(together) > self.max_size:
            return False
        if self.max_bytes is None or len(together) <= 1:
            return True
        total = total_bytes(together)
        return total is not None and total <= self.max_bytes

    def victims(self, residents: Iterable[Entry], newcomer: Entry) -> list[Entry] | None:
        """Return the idle entries to close so that ``newcomer`` fits, least recently used first; ``None`` if it cannot.

        Args:
            residents: The resident entries, least recently used first.
            newcomer: The entry to load, with its estimated parts.
        """
        oldest_idle, fits = self._oldest_idle(residents, newcomer)
        return oldest_idle if fits else None

    def surplus(self, residents: Iterable[Entry], newest: Entry) -> list[Entry]:
        """Return the idle entries to close because ``newest`` is larger than estimated."""
        return self._oldest_idle([entry for entry in residents if entry is not newest], newest)[0]

    def _oldest_idle(self, residents: Iterable[Entry], newcomer: Entry) -> tuple[list[Entry], bool]:
        """Return the idle entries to close, oldest first, until ``newcomer`` fits; and whether it fits then."""
        staying = list(residents)
        victims: list[Entry] = []
        for entry in [entry for entry in staying if entry.idle]:
            if self.allows([*staying, newcomer]):
                break
            staying.remove(entry)
            victims.append(entry)
        return victims, self.allows([*staying, newcomer])

    def never_allows(self, residents: Iterable[Entry], newcomer: Entry, asker: Operation) -> bool:
        """Whether ``newcomer`` still has no room once every lease and load that ``asker`` can wait for has ended."""
        return not self.allows([*(entry for entry in residents if not entry.ends_without(asker)), newcomer])

    def waits_for_ended_threads(self, residents: Iterable[Entry], newcomer: Entry, asker: Operation) -> bool:
        """Whether ``newcomer`` has room only if somebody releases an ended thread's lease."""
        entries = list(residents)
        left = [entry for entry in entries if any(claim.orphaned for claim in entry.claims)]
        staying = [entry for entry in entries if entry in left or not entry.ends_without(asker)]
        return bool(left) and not self.allows([*staying, newcomer])


def total_bytes(entries: Iterable[Entry]) -> int | None:
    """Return the bytes of ``entries``, each shared part counted once; ``None`` if a size is unknown."""
    parts: dict[Hashable, int] = {}
    for entry in entries:
        if entry.parts is None:
            return None
        for part, size in entry.parts.items():
            parts[part] = max(size, parts.get(part, 0))
    return sum(parts.values())


def format_parts(parts: SizeByPart | None) -> str:
    """Return a readable size, or "an unknown size"."""
    return "an unknown size" if parts is None else format_bytes(sum(parts.values()))
