"""Sequences of any lengths in one row, without padding: each attends to itself alone, or to one that it continues.

All that a transformer computes token by token, which is nearly all of it, does not care which sequence a token is
from. Only attention does, so it is taken over while such a row goes through the model: transformers lets a model's
attention be exchanged by name. Sequences of similar length are put side by side for it, by transformers' own function.
What several sequences have in common at their beginning can stand in a row once, and their continuations at its end.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.hf import batches
from pytest_sway.errors import BackendUseError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_NAME: Final = "pytest_sway_packed"
_STOOD_IN_FOR: Final = "sdpa"
_CHOICE: Final = "_attn_implementation_internal"
_WINDOWS: Final = ("sliding_window", "attention_chunk_size")

_CALL_POSITIONS: Final = 256
"""What one call of attention costs besides its positions, as a number of positions."""


class MaskedError(Exception):
    """A model has a mask of its own for what it was given in a row; nobody outside of the scoring sees this."""


class _Group(NamedTuple):
    """Neighbours in a row that attend side by side.

    Attributes:
        start: Where the first begins in the row.
        end: Where the last ends.
        size: How many they are.
        gather: For each of ``size`` times the longest's positions, the one in the row that stands there.
        valid: Which of these are no padding, in the row's order; ``None`` if all are.
    """

    start: int
    end: int
    size: int
    gather: Any
    valid: Any


class _Continuations(NamedTuple):
    """What continues one sequence of a row.

    Attributes:
        before: Where the sequence begins and ends in the row.
        own: Where the first continuation begins and the last ends.
        mask: Which positions of both each position of the latter heeds, shape ``(1, 1, latter, both)``.
    """

    before: slice
    own: slice
    mask: Any


class Row:
    """Several sequences as one.

    Args:
        sequences: Token ids of each.
        device: Where its tensors go.
        continuations: Token ids of what continues a sequence, by its index; any number for each, some maybe empty.

    Attributes:
        input_ids: All tokens, shape ``(1, positions)``.
        position_ids: The position of each in its own sequence, of the same shape.
        starts: Where each sequence begins in the row.
        continued: Where each sequence's continuations begin, by the same index.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        device: Any,
        continuations: Mapping[int, Sequence[Sequence[int]]] = MappingProxyType({}),
    ) -> None:
        import torch

        lengths = [len(ids) for ids in sequences]
        side_by_side = batches.in_batches(lengths, tokens=len(lengths) * max(lengths), overhead=_CALL_POSITIONS)
        order = [i for group in side_by_side for i in group]
        ends = list(accumulate(lengths[i] for i in order))
        self.starts = [0] * len(sequences)
        for i, end in zip(order, ends, strict=True):
            self.starts[i] = end - lengths[i]
        tokens = [token for i in order for token in sequences[i]]
        positions = [p for i in order for p in range(lengths[i])]
        self._groups = [self._group([(self.starts[i], lengths[i]) for i in group], device) for group in side_by_side]
        self._continuations: list[_Continuations] = []
        self.continued: dict[int, list[int]] = {}
        for i, tails in continuations.items():
            start = len(tokens)
            self.continued[i] = [start + before for before in accumulate(map(len, tails[:-1]), initial=0)]
            tokens += [token for tail in tails for token in tail]
            positions += [lengths[i] + p for tail in tails for p in range(len(tail))]
            if len(tokens) > start:
                mask = _continuing(lengths[i], list(map(len, tails)), device)
                before = slice(self.starts[i], self.starts[i] + lengths[i])
                self._continuations.append(_Continuations(before, slice(start, len(tokens)), mask))
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = torch.tensor([positions], device=device)

    def attention(self, attend: Any, module: Any, tensors: Sequence[Any], **kwargs: Any) -> Any:
        """Return what ``attend`` gives for each sequence by itself, or after the one that it continues.

        Its shape is ``(1, positions, heads, head size)``.

        Args:
            attend: transformers' attention, causal unless there is a mask.
            module: The attention module.
            tensors: Queries, keys and values of the row, each ``(1, heads, positions, head size)``.
            **kwargs: What else the module passes.
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
        for before, own, mask in self._continuations:
            query, *others = tensors
            heeded = (torch.cat([tensor[:, :, before], tensor[:, :, own]], dim=2) for tensor in others)
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
    """Have a model with this configuration attend within each of the row's sequences."""
    _interface().register(_NAME, _attend)
    attributes = vars(config)
    before, token = attributes[_CHOICE], _ROW.set(row)
    attributes[_CHOICE] = _NAME
    try:
        yield
    finally:
        attributes[_CHOICE] = before
        _ROW.reset(token)


def longest_packed(config: Any) -> int:
    """Return the most tokens that a sequence in a row may have; 0 where the model's attention cannot be taken over.

    A model that attends within a window only does so by its mask, which a row has not. Up to the window's length that
    is no difference.
    """
    if vars(config).get(_CHOICE) != _STOOD_IN_FOR:
        return 0
    return min([2**31, *(int(window) for name in _WINDOWS if (window := getattr(config, name, None)))])


def _continuing(length: int, tails: Sequence[int], device: Any) -> Any:
    """The mask of continuations with these lengths, of a sequence of ``length``: each heeds that, and itself so far."""
    import torch

    tail = torch.repeat_interleave(torch.tensor(tails, device=device))
    earlier = torch.ones(len(tail), len(tail), dtype=torch.bool, device=device).tril()
    own = earlier & (tail.unsqueeze(0) == tail.unsqueeze(1))
    return torch.cat([own.new_ones(len(tail), length), own], dim=1)[None, None]


def _side_by_side(tensor: Any, group: _Group) -> Any:
    """``(1, heads, positions, size)`` as ``(sequences, heads, longest, size)``."""
    rows = tensor[0].index_select(1, group.gather)
    return rows.unflatten(1, (group.size, -1)).transpose(0, 1)


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    row = _ROW.get(None)
    if row is None:
        raise BackendUseError(
            "a view's `model` was called in one thread while a view on the same base was scoring in another. Let them"
            " take turns, or score through views only, which any number of threads may do."
        )
    if attention_mask is not None:
        raise MaskedError("this model masks more than what comes later")
    attend = _interface()()[_STOOD_IN_FOR]
    return row.attention(attend, module, (query, key, value), **kwargs), None


def _interface() -> Any:
    from transformers import AttentionInterface

    return AttentionInterface
