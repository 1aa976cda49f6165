"""Which sequences go through the model together. Pure arithmetic on lengths; nothing here is measured or loaded.

A pass costs as many token positions as its longest sequence has, times its rows, or where sequences are not padded, as
they have in all; and besides that about as much as some tens of positions more on a CPU (hundreds on an accelerator),
since all weights are read whatever the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import isqrt
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_sway.backends.hf.tokenisation import Window

_PAIRS: Final = 2048
"""About how many pairs of positions cost attention as much as one position costs elsewhere; counted in operations it is
3,000 in SmolLM2-135M, and attention does fewer operations in a second."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one pass may hold, on one device.

    Attributes:
        tokens: The most token positions, with padding, unless one sequence alone has more.
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
        return _filled(order[::-1], lengths, tokens)
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


def _filled(order: Sequence[int], lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """As few batches as hold all, one after the other."""
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


def worth_sharing(windows: Sequence[Window], overhead: int) -> bool:
    """Whether windows of one context should have it computed once.

    What that saves is the context's positions for each window but one. What it costs, besides ``overhead`` positions,
    is attention: all continuations are put side by side for it, though each heeds itself and the context alone.
    """
    saved = (len(windows) - 1) * len(windows[0].context)
    continued = sum(len(window.scored) - 1 for window in windows)
    return saved > overhead + continued**2 // _PAIRS


def families(windows: Sequence[Window], limits: Limits) -> list[list[Window]]:
    """Divide windows, in their order, into neighbours that are worth to share a context in a row, and single ones."""
    found: list[list[Window]] = []
    for _, neighbours in groupby(windows, key=lambda window: window.context):
        for part in parted(list(neighbours), limits.few_logits_tokens):
            found += [part] if worth_sharing(part, limits.overhead) else [[window] for window in part]
    return found


def positions(family: Sequence[Window]) -> int:
    """Return how many token positions windows of one context have that is computed once."""
    return len(family[0].context) + sum(len(window.scored) - 1 for window in family)


def parted(windows: Sequence[Window], tokens: int) -> list[list[Window]]:
    """Divide windows of one context into parts that each compute it once.

    What follows the context in one part is long enough to be worth the context's positions, and short enough not to
    pay more for attention, see `worth_sharing`: for continuations of ``n`` positions in all, parts of ``p`` positions
    cost ``n / p * context + n * p / _PAIRS``, which is least where ``p**2 = _PAIRS * context``. It also has to have
    room in a batch of ``tokens`` positions, of which it may have half where the context leaves it less.
    """
    context = len(windows[0].context)
    most = min(isqrt(_PAIRS * context), max(tokens - context, tokens // 2))
    parts: list[list[Window]] = []
    room = -1
    for window in windows:
        continued = len(window.scored) - 1
        if continued > room:
            parts.append([])
            room = most
        parts[-1].append(window)
        room -= continued
    return parts
