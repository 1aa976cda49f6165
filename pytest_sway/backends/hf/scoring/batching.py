"""Decides which sequences share a pass, and retries a batch that runs out of memory in halves.

Decisions are arithmetic on lengths; nothing is measured or loaded here. A pass costs its token positions: with padding,
the longest sequence's length times the number of rows. It also has a fixed cost of some tens of positions on a CPU and
hundreds on an accelerator, because it reads all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.errors import ScoringError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_sway.backends.text.tokens import Window


_PAIRS: Final = 2048
"""About how many pairs of positions in attention cost as much as one position in the rest of the model. Counting
operations gives 3,000 for SmolLM2-135M, but attention does fewer operations per second."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one pass on a device may hold.

    Attributes:
        tokens: The most token positions, with padding, unless one sequence or prefix group alone has more.
        few_logits_tokens: The same, if logits are wanted for less than half of them, which leaves more memory.
        overhead: The fixed cost of a pass, as a number of positions.
        logits_bytes: Approximate bytes of logits that exist at once.
        worth_trimming: The number of positions from which on the heap gives memory back before the body and before the
            head. That takes about a hundredth of such a pass, and the memory of body and head does not add up.
        cached_tokens: The most token positions in key-value caches, unless one sequence alone has more.
        decoded_tokens: The same, for texts that grow together.
        tokens_between_looks: The number of new tokens after which texts that have ended are found. A look waits for the
            device.
        attention_columns: The number of tokens by which the attention of texts that grow widens. On a GPU, a kernel may
            be built for each new shape: cuDNN takes 60 ms on an H200.
    """

    tokens: int
    few_logits_tokens: int
    overhead: int
    logits_bytes: int
    worth_trimming: int
    cached_tokens: int
    decoded_tokens: int
    tokens_between_looks: int
    attention_columns: int


CPU: Final = Limits(
    tokens=768,
    few_logits_tokens=1536,
    overhead=48,
    logits_bytes=24 * 2**20,
    worth_trimming=384,
    cached_tokens=2048,
    decoded_tokens=8192,
    tokens_between_looks=1,
    attention_columns=1,
)
ACCELERATOR: Final = Limits(
    tokens=16384,
    few_logits_tokens=16384,
    overhead=512,
    logits_bytes=256 * 2**20,
    worth_trimming=2**31,
    cached_tokens=32768,
    decoded_tokens=32768,
    tokens_between_looks=4,
    attention_columns=64,
)


def in_batches(lengths: Sequence[int], *, tokens: int, overhead: int, padded: bool = True) -> list[list[int]]:
    """Divide sequences into batches that cost least in total.

    Sequences of similar length share a batch. Dynamic programming finds the cuts for the cost in this module's
    docstring.

    Args:
        lengths: The length of each sequence, in tokens.
        tokens: The most positions of a batch, with padding; a longer sequence gets its own batch.
        overhead: The fixed cost of a batch, as a number of positions.
        padded: Whether sequences are padded to the longest of their batch.

    Returns:
        For each batch the indices of its sequences. The longest batch comes first, so that too little memory shows
        early.
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
    """Divide sequences into batches that are filled one after the other, in the given order.

    Args:
        order: The indices of the sequences.
        lengths: The length of each sequence, in tokens.
        tokens: The most positions of a batch; a longer sequence gets its own batch.
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
    """Group windows by their context, in the order of its first appearance."""
    groups: dict[tuple[int, ...], list[Window]] = {}
    for window in windows:
        groups.setdefault(window.context, []).append(window)
    return list(groups.values())


def worth_caching(windows: Sequence[Window], overhead: int) -> bool:
    """Return whether to compute the common context of some windows once, and continue from a key-value cache.

    This saves the context's positions for all windows but one. It costs two more passes: one for the context, and one
    for an unfilled batch. All hidden states of these windows are in memory at once, so the positions saved must
    outnumber those left. Windows that share only BOS do not reach that.
    """
    saved = (len(windows) - 1) * len(windows[0].context)
    return saved > 2 * overhead + sum(len(window.scored) - 1 for window in windows)


class PrefixGroup(NamedTuple):
    """Sequences whose common prefixes are computed once.

    Attributes:
        members: The indices of the sequences, in the order of their tokens, so that neighbours share prefixes.
        prefix: The length of the prefix that all of them share.
        positions: The number of token positions; a prefix that neighbours share counts once.
    """

    members: Sequence[int]
    prefix: int
    positions: int

    @property
    def suffixes(self) -> int:
        """The number of positions after the prefix."""
        return self.positions - self.prefix

    @property
    def cost(self) -> int:
        """The cost, as a number of positions; see `families`."""
        return self.positions + self.suffixes**2 // _PAIRS


def alone(sequences: Sequence[Sequence[int]]) -> list[PrefixGroup]:
    """Return a prefix group for each sequence by itself."""
    return [PrefixGroup([i], len(ids), len(ids)) for i, ids in enumerate(sequences)]


def families(sequences: Sequence[Sequence[int]], *, tokens: int, overhead: int) -> list[PrefixGroup]:
    """Group sequences with a common prefix if computing it once is cheaper; all others are alone.

    Sequences are sorted by tokens, so that those with a common prefix are neighbours. A group saves positions, but
    costs attention: its suffixes attend in one call, although each sequence attends to itself alone. Neighbours are
    merged, those with the longest common prefix first, if the group costs no more than they do apart, and if its
    suffixes are

    * short enough not to cost more attention than the prefix saves: ``n`` positions of suffixes, in groups of ``p``,
      cost ``n / p * prefix + n * p / _PAIRS``, which is least at ``p**2 = _PAIRS * prefix``;
    * short enough for a batch, or for half of one if the prefix leaves less.

    Args:
        sequences: Token ids of each sequence.
        tokens: The most positions of a batch.
        overhead: The fixed cost of a group, as a number of positions.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    shared = [shared_length(sequences[i], sequences[j]) for i, j in pairwise(order)]
    singles = alone([sequences[i] for i in order])
    grown = dict(enumerate(singles))  # by the place of the first member
    first = list(range(len(order)))  # the place of the first member, by that of the last
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
    """Return the length of the common prefix of two sequences of the same type."""
    known, most = 0, min(len(one), len(other))
    while known < most:
        middle = (known + most + 1) // 2
        if one[known:middle] == other[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known


__tracebackhide__ = True

_T = TypeVar("_T")


def in_halves(run: Callable[..., Any], work: Callable[..., list[Any]], batch: Sequence[_T], *args: Any) -> list[Any]:
    """Return ``run(work, batch, *args)``, one answer for each item. If memory runs out, run each half by itself.

    Raises:
        ScoringError: There is not enough memory for a single item.
    """
    try:
        answers: list[Any] = run(work, batch, *args)
        return answers
    except Exception as error:
        if not out_of_memory(error):
            raise
        if len(batch) == 1:
            raise ScoringError(
                "there is not enough memory to run this model on a single text of this length. Shorten the text,"
                f" load fewer or smaller models (--sway-cache-size, dtype), or use another device. ({error})"
            ) from error
    _return_memory()  # after the handler: its error keeps the tensors of the failed pass alive
    middle = len(batch) // 2
    return [
        *in_halves(run, work, batch[:middle], *args),
        *in_halves(run, work, batch[middle:], *args),
    ]


def _return_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
