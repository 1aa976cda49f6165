"""Prefix sharing and packing: sequences of any lengths in one row, without padding. Each attends to itself alone.

A transformer computes most things for each token alone. Only attention mixes tokens. So a row of several sequences goes
through the model with another attention function, which transformers lets us register by name. It puts sequences of
similar length side by side and calls transformers' own function for them.

Sequences with a common prefix share it: the row has the prefix once, and the suffixes follow at the row's end. They
form a tree: tokens that several suffixes have in common are stored once, too.

A model's choice of attention is a private attribute of its config in transformers. If it is missing, nothing is packed,
and texts go through the model padded.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from pytest_sway.backends.hf.scoring import batching

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_sway.backends.hf.scoring.batching import PrefixGroup

__tracebackhide__ = True

_NAME: Final = "pytest_sway_packed"
_REPLACED: Final = "sdpa"
_CHOICE_FIELD: Final = "_attn_implementation_internal"
_WINDOW_FIELDS: Final = ("sliding_window", "attention_chunk_size")

_CALL_POSITIONS: Final = 256
"""The fixed cost of one call of attention, as a number of positions."""


class MaskedError(Exception):
    """A model masks more than later tokens, so its sequences cannot be packed. Only the scoring code sees this."""


class _Group(NamedTuple):
    """Neighbours in a row that attend side by side.

    Attributes:
        start: Where the first sequence begins in the row.
        end: Where the last one ends.
        size: The number of sequences.
        gather: The positions of the padded sequences, counted from ``start``: ``size`` times the longest length.
        valid: The indices of those in ``gather`` that are no padding, in the row's order; ``None`` if all are.
    """

    start: int
    end: int
    size: int
    gather: Any
    valid: Any


class _Suffixes(NamedTuple):
    """The suffixes of one prefix group.

    Attributes:
        prefix: The prefix's positions in the row.
        own: The suffixes' positions in the row.
        mask: Which positions of both each suffix position attends to, shape ``(1, 1, suffixes, prefix + suffixes)``.
    """

    prefix: slice
    own: slice
    mask: Any


class _Layout(NamedTuple):
    """The positions of a sequence's tokens in a row.

    Attributes:
        sequence: The sequence's index.
        places: Runs of positions, for all of its tokens; the last run is for tokens that no earlier sequence has.
    """

    sequence: int
    places: list[range]


class Row(Protocol):
    """Tokens of several texts in one row.

    Attributes:
        input_ids: The tokens, shape ``(1, positions)``.
        position_ids: The position of each token in its own text, of the same shape.
    """

    input_ids: Any
    position_ids: Any

    def attention(self, attend: Any, module: Any, tensors: Sequence[Any], /, **kwargs: Any) -> Any:
        """Return attention within each text; see `PackedBatch.attention`."""
        ...


class PackedBatch:
    """Several sequences in one row.

    Args:
        sequences: Token ids of each sequence.
        device: The device of its tensors.
        families: The prefix groups of the sequences; each sequence is in one. By default each is alone.

    Attributes:
        input_ids: All tokens, shape ``(1, positions)``.
        position_ids: The position of each token in its own sequence, of the same shape.
        places: The positions of each sequence's tokens in the row, as runs of neighbours.
    """

    def __init__(
        self, sequences: Sequence[Sequence[int]], device: Any, families: Sequence[PrefixGroup] | None = None
    ) -> None:
        import torch

        families = batching.alone(sequences) if families is None else families
        prefixes = [sequences[family.members[0]][: family.prefix] for family in families]
        lengths = list(map(len, prefixes))
        side_by_side = batching.in_batches(lengths, tokens=len(lengths) * max(lengths), overhead=_CALL_POSITIONS)
        order = [f for group in side_by_side for f in group]
        starts = dict(zip(order, accumulate((lengths[f] for f in order), initial=0), strict=False))
        self._groups = [self._group([(starts[f], lengths[f]) for f in group], device) for group in side_by_side]
        tokens = [token for f in order for token in prefixes[f]]
        positions = [p for f in order for p in range(lengths[f])]
        self.places: list[list[range]] = [[]] * len(sequences)
        self._suffixes: list[_Suffixes] = []
        for f, family in enumerate(families):
            prefix, own = slice(starts[f], starts[f] + family.prefix), slice(len(tokens), len(tokens) + family.suffixes)
            laid = _lay_out(sequences, family, prefix.start, own.start)
            for i, places in laid:
                self.places[i] = places
                known = len(sequences[i]) - len(places[-1])
                tokens += sequences[i][known:]
                positions += range(known, len(sequences[i]))
            if family.suffixes:
                self._suffixes.append(_Suffixes(prefix, own, _suffix_mask(laid, family, own.start, device)))
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = torch.tensor([positions], device=device)

    def attention(self, attend: Any, module: Any, tensors: Sequence[Any], /, **kwargs: Any) -> Any:
        """Return attention within each sequence, shape ``(1, positions, heads, head size)``.

        Args:
            attend: transformers' attention function, causal unless it gets a mask.
            module: The attention module.
            tensors: Queries, keys and values of the row, each ``(1, heads, positions, head size)``.
            **kwargs: The module's other arguments.
        """
        import torch

        parts = []
        for group in self._groups:
            mine = [tensor[:, :, group.start : group.end] for tensor in tensors]
            if group.size == 1:
                parts.append(attend(module, *mine, None, **kwargs)[0])
                continue
            output = attend(module, *(_side_by_side(tensor, group) for tensor in mine), None, **kwargs)[0].flatten(0, 1)
            parts.append((output if group.valid is None else output.index_select(0, group.valid)).unsqueeze(0))
        for prefix, own, mask in self._suffixes:
            query, *others = tensors
            heeded = (torch.cat([tensor[:, :, prefix], tensor[:, :, own]], dim=2) for tensor in others)
            parts.append(attend(module, query[:, :, own], *heeded, mask, **kwargs)[0])
        return torch.cat(parts, dim=1)

    def _group(self, places: Sequence[tuple[int, int]], device: Any) -> _Group:
        import torch

        first, longest = places[0][0], max(length for _, length in places)
        gather = [start - first + min(p, length - 1) for start, length in places for p in range(longest)]
        valid = [i * longest + p for i, (_, length) in enumerate(places) for p in range(length)]
        return _Group(
            first,
            places[-1][0] + places[-1][1],
            len(places),
            torch.tensor(gather, device=device),
            None if len(valid) == len(gather) else torch.tensor(valid, device=device),
        )


_ROW: ContextVar[Row] = ContextVar("row")


@contextmanager
def attending_apart(config: Any, row: Row) -> Iterator[None]:
    """Make a model with this configuration attend within each of the row's sequences."""
    _interface().register(_NAME, _attend)
    attributes = vars(config)
    before, token = attributes[_CHOICE_FIELD], _ROW.set(row)
    attributes[_CHOICE_FIELD] = _NAME
    try:
        yield
    finally:
        attributes[_CHOICE_FIELD] = before
        _ROW.reset(token)


def longest_packed(config: Any) -> int:
    """Return the most tokens of a sequence in a row; 0 if the model's attention cannot be replaced.

    A model with a sliding window applies it by its mask, which a row does not have. Up to the window's length, that
    makes no difference. Llama 4 scales each query by its place in the row, which shows only after thousands of tokens.
    """
    if vars(config).get(_CHOICE_FIELD) != _REPLACED or getattr(config, "attn_temperature_tuning", False):
        return 0
    return min([2**31, *(int(window) for name in _WINDOW_FIELDS if (window := getattr(config, name, None)))])


def _lay_out(sequences: Sequence[Sequence[int]], family: PrefixGroup, prefix: int, suffixes: int) -> list[_Layout]:
    """Lay out a prefix group's tokens. A prefix that neighbours share is stored once.

    Args:
        sequences: Token ids of each sequence.
        family: The prefix group.
        prefix: Where its prefix begins in the row.
        suffixes: Where its suffixes begin.
    """
    laid = []
    before, places = sequences[family.members[0]][: family.prefix], [range(prefix, prefix + family.prefix)]
    for i in family.members:
        shared = batching.shared_length(before, sequences[i])
        new = range(suffixes, suffixes + len(sequences[i]) - shared)
        places = [*_first(places, shared), new]
        laid.append(_Layout(i, places))
        before, suffixes = sequences[i], new.stop
    return laid


def _first(runs: Sequence[range], count: int) -> Iterator[range]:
    """Yield the first ``count`` positions of some runs, as runs."""
    for run in runs:
        if count > 0 and run:
            yield run[:count]
        count -= len(run)


def _suffix_mask(laid: Sequence[_Layout], family: PrefixGroup, suffixes: int, device: Any) -> Any:
    """Return the suffixes' mask: a position attends to the prefix, and to earlier ones of its own sequence."""
    import torch

    mask = torch.zeros(family.suffixes, family.positions, dtype=torch.bool)
    mask[:, : family.prefix] = True
    own = mask[:, family.prefix :]
    for _, (_, *before, new) in laid:
        rows = own[new.start - suffixes : new.stop - suffixes]
        for run in before:
            rows[:, run.start - suffixes : run.stop - suffixes] = True
        rows[:, new.start - suffixes : new.stop - suffixes] = torch.ones(len(new), len(new), dtype=torch.bool).tril()
    return mask[None, None].to(device)


def _side_by_side(tensor: Any, group: _Group) -> Any:
    """Return ``(1, heads, positions, size)`` as ``(sequences, heads, longest, size)``."""
    rows = tensor[0].index_select(1, group.gather)
    return rows.unflatten(1, (group.size, -1)).transpose(0, 1)


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    if attention_mask is not None:
        raise MaskedError("this model masks more than what comes later")
    attend = _interface()()[_REPLACED]
    return _ROW.get().attention(attend, module, (query, key, value), **kwargs), None


def _interface() -> Any:
    from transformers import AttentionInterface

    return AttentionInterface
