"""Which sequences go through the model together. Pure arithmetic on lengths; nothing here is measured or loaded.

A pass costs as many token positions as its longest sequence has, times its rows, or where sequences are not padded, as
they have in all; and besides that about as much as some tens of positions more on a CPU (hundreds on an accelerator),
since all weights are read whatever the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_sway.backends.text.tokens import Window

_PAIRS: Final = 2048
"""About how many pairs of positions cost attention as much as one position costs elsewhere; counted in operations it is
3,000 in SmolLM2-135M, and attention does fewer operations in a second."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one pass may hold, on one device.

    Attributes:
        tokens: The most token positions, with padding, unless one sequence or one family alone has more.
        few_logits_tokens: The same where the logits of less than half of them are wanted, which leaves memory for more.
        overhead: What a pass costs besides its positions, as a number of positions.
        logits_bytes: About as many bytes of logits exist at once.
        worth_trimming: From how many positions on the heap gives memory back before the body and before the head. It is
            about a hundredth of such a pass, and what body and head need does not add up.
        cached_tokens: The most token positions that key-value caches may hold, unless one sequence alone has more.
    """

    tokens: int
    few_logits_tokens: int
    overhead: int
    logits_bytes: int
    worth_trimming: int
    cached_tokens: int


CPU: Final = Limits(
    tokens=768, few_logits_tokens=1536, overhead=48, logits_bytes=24 * 2**20, worth_trimming=384, cached_tokens=2048
)
ACCELERATOR: Final = Limits(
    tokens=16384,
    few_logits_tokens=16384,
    overhead=512,
    logits_bytes=256 * 2**20,
    worth_trimming=2**31,
    cached_tokens=32768,
)


def in_batches(lengths: Sequence[int], *, tokens: int, overhead: int, padded: bool = True) -> list[list[int]]:
    """Divide sequences into batches such that the whole costs least.

    Sorted by length, neighbours share a batch; where to cut is found by dynamic programming over the cost that this
    module's docstring states.

    Args:
        lengths: Length of each sequence, in tokens.
        tokens: The most positions, with padding, that a batch may have; a sequence longer than that stands alone.
        overhead: What a batch costs besides its positions.
        padded: Whether sequences are padded to the longest of their batch.

    Returns:
        For each batch the indices of its sequences, longest batch first, so that what does not fit shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    if not padded:
        return in_turn(order[::-1], lengths, tokens)
    cost = [0] * (len(order) + 1)
    start = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        longest = max(1, lengths[order[end - 1]])
        first = max(0, end - max(1, tokens // longest))
        cost[end], start[end] = min(
            (cost[begin] + overhead + (end - begin) * longest, begin) for begin in range(first, end)
        )
    batches, end = [], len(order)
    while end:
        batches.append(order[start[end] : end][::-1])
        end = start[end]
    return batches


def in_turn(order: Iterable[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Divide sequences, in this order, into batches that are filled one after the other.

    Args:
        order: Their indices.
        lengths: Length of each, in tokens.
        tokens: The most positions that a batch may have; a sequence longer than that stands alone.
    """
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if lengths[i] > room or not batches:
            batches.append([])
            room = tokens
        batches[-1].append(i)
        room -= lengths[i]
    return batches


def by_context(windows: Sequence[Window]) -> list[list[Window]]:
    """Group windows by their context, in the order in which each first came."""
    groups: dict[tuple[int, ...], list[Window]] = {}
    for window in windows:
        groups.setdefault(window.context, []).append(window)
    return list(groups.values())


def worth_caching(windows: Sequence[Window], overhead: int) -> bool:
    """Whether windows of one context should have it computed once, and continue from a key-value cache.

    What that saves is the context's positions for each window but one. What it costs is two passes more, one for the
    context and one for what does not fill a batch. Since all hidden states of these windows are in memory at once, it
    is done only where it saves more than what is left, which texts that have nothing but BOS in common do not.
    """
    saved = (len(windows) - 1) * len(windows[0].context)
    return saved > 2 * overhead + sum(len(window.scored) - 1 for window in windows)


class PrefixGroup(NamedTuple):
    """Sequences whose common beginnings are computed once.

    Attributes:
        members: Their indices, in the order of their tokens, so that those which begin alike are neighbours.
        prefix: The length of what all of them begin with.
        positions: How many token positions they have, what neighbours begin with in common counted once.
    """

    members: Sequence[int]
    prefix: int
    positions: int

    @property
    def suffixes(self) -> int:
        """How many positions come after the prefix."""
        return self.positions - self.prefix

    @property
    def cost(self) -> int:
        """What it costs, as a number of positions; see `families`."""
        return self.positions + self.suffixes**2 // _PAIRS


def alone(sequences: Sequence[Sequence[int]]) -> list[PrefixGroup]:
    """Return a family for each sequence."""
    return [PrefixGroup([i], len(ids), len(ids)) for i, ids in enumerate(sequences)]


def families(sequences: Sequence[Sequence[int]], *, tokens: int, overhead: int) -> list[PrefixGroup]:
    """Group sequences that begin alike where it is worth to compute that once; each of the others is alone.

    Sorted, sequences that begin alike are neighbours. A family saves positions, and it costs attention: all that comes
    after its prefix is put side by side for that, though each sequence heeds itself alone. So neighbours become one
    family, those that have most in common first, where that costs no more than they cost apart, and where what comes
    after the prefix remains

    * short enough not to pay more for attention than for the prefix: suffixes of ``n`` positions in all, in families of
      ``p``, cost ``n / p * prefix + n * p / _PAIRS``, which is least where ``p**2 = _PAIRS * prefix``;
    * in a batch, of which it may have half where the prefix leaves it less.

    Args:
        sequences: Token ids of each.
        tokens: The most positions that a batch may have.
        overhead: What a family costs besides, as a number of positions.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    shared = [shared_length(sequences[i], sequences[j]) for i, j in pairwise(order)]
    singles = alone([sequences[i] for i in order])
    grown = dict(enumerate(singles))  # by the place of the first member
    first = list(range(len(order)))  # by the place of the last member, that of the first
    for place in sorted(range(1, len(order)), key=lambda place: -shared[place - 1]):
        start, prefix = first[place - 1], shared[place - 1]
        one, other = grown[start], grown[place]
        joined = PrefixGroup(range(start, other.members[-1] + 1), prefix, one.positions + other.positions - prefix)
        most = min(isqrt(_PAIRS * prefix), max(tokens - prefix, tokens // 2))
        if joined.cost <= one.cost + other.cost and joined.suffixes <= most:
            grown[start] = joined
            first[joined.members[-1]] = start
            del grown[place]
    found: list[PrefixGroup] = []
    for family in grown.values():
        apart = [singles[place] for place in family.members]
        saves = sum(single.cost for single in apart) - family.cost
        found += [family] if saves > overhead else apart
    return [family._replace(members=[order[place] for place in family.members]) for family in found]


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences of one type begin with in common."""
    known, most = 0, min(len(one), len(other))
    while known < most:
        middle = (known + most + 1) // 2
        if one[known:middle] == other[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known
