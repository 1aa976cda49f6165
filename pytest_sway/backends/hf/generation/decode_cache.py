"""`DecodeCache`: the keys and values of a batch of texts that grow by one token in each pass.

A pass takes the next token of each text, side by side in one row. Only attention mixes tokens. So the row goes through
the model as in `packing`, with an attention function that reads and fills this cache. Memory is allocated once, texts
of different lengths need no padding in the model, and a text that has ended leaves the batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.scoring.packing import PackedBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_sway.backends.hf.scoring.batching import PrefixGroup

__tracebackhide__ = True

_ALIGNED: Final = 8
"""Masks of a multiple of this many columns are fast on a GPU."""


class DecodeCache:
    """The keys and values of some texts, by the attention calls of a pass.

    The prompts end in the same column, so that all texts have their next token in the next one.

    Args:
        prompts: The token ids of each text so far.
        room: The most tokens that each of them grows by.
        device: The model's device.
        block: The number of columns by which attention widens.

    Attributes:
        lengths: The number of tokens of each text.
        columns: The number of columns in use.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], room: int, device: Any, block: int) -> None:
        import torch

        self.lengths = list(map(len, prompts))
        self.columns = max(self.lengths)
        self._block = block
        self._aligned = max(_ALIGNED, self._block)
        self._capacity = _rounded_up(self.columns + room, self._aligned)
        self._buffers: list[tuple[Any, Any]] = []
        self._device = device
        self._first, self._end = 0, self.columns
        padding = torch.tensor([[[self.columns - length]] for length in self.lengths])
        columns = torch.arange(self._capacity)
        masked = (columns < padding) | (columns >= self.columns)
        mask = torch.zeros(len(prompts), 1, 1, self._capacity)
        self._mask: Any = mask.masked_fill_(masked.unsqueeze(1), -math.inf).to(device)
        self._positions: Any = torch.tensor(self.lengths, device=device)

    def prefilled(self, rows: Sequence[int], sequences: Sequence[Sequence[int]], families: Any) -> PackedBatch:
        """Return a packed batch of some prompts; its pass fills these rows of the cache.

        Args:
            rows: The rows.
            sequences: The token ids of their prompts.
            families: The prefix groups of these.
        """
        return _Prefill(self, rows, sequences, self._device, families)

    def step(self, tokens: Any) -> _Step:
        """Return a row of each text's next token, for one pass.

        Args:
            tokens: Their ids, shape ``(texts,)``.
        """
        return _Step(self, tokens)

    def drop(self, row: int) -> None:
        """Drop a text. The last one takes its row."""
        last = len(self.lengths) - 1
        if row != last:
            for buffers in self._buffers:
                for buffer in buffers:
                    buffer[row, :, : self.columns] = buffer[last, :, : self.columns]
            self._mask[row] = self._mask[last]
            self._positions[row] = self._positions[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self._mask, self._positions = self._mask[:last], self._positions[:last]

    # --- used by the passes -------------------------------------------------------------------------------------------

    def fill(self, call: int, rows: Any, key: Any, value: Any) -> None:
        """Take the keys and values of some rows' prompts, each ``(rows, heads, columns, size)``."""
        if call == len(self._buffers):
            self._buffers.append((self._empty(key), self._empty(value)))
            self._mask = self._mask.to(key.dtype)
        for buffer, tensor in zip(self._buffers[call], (key, value), strict=True):
            buffer[rows, :, : self.columns] = tensor

    def _empty(self, like: Any) -> Any:
        _, heads, _, size = like.shape
        # Columns that are read before they are written are masked, but their numbers must be finite, too.
        empty = like.new_empty if self._block == 1 else like.new_zeros
        return empty(len(self.lengths), heads, self._capacity, size)

    def begin(self) -> tuple[Any, Any]:
        """Add a column. Return the position of each text's next token, and the mask of its attention."""
        lengths = self.lengths
        positions, column = self._positions.unsqueeze(0), self.columns
        self._first = (column - max(lengths)) // self._aligned * self._aligned  # a longer text may have been dropped
        self.columns += 1
        self._end = _rounded_up(self.columns, self._block)
        self._mask[..., column] = 0.0
        equal = self._first + lengths[0] == column and len(set(lengths)) == 1 and self._end == self.columns
        self._positions = self._positions + 1
        self.lengths = [length + 1 for length in lengths]
        return positions, None if equal else self._mask[..., self._first : self._end]

    def grown(self, call: int, key: Any, value: Any) -> list[Any]:
        """Add each text's next key and value, ``(texts, heads, size)``, and return all of them."""
        found = []
        for buffer, tensor in zip(self._buffers[call], (key, value), strict=True):
            rows = buffer[: len(tensor)]
            rows[:, :, self.columns - 1] = tensor
            found.append(rows[:, :, self._first : self._end])
        return found


class _Prefill(PackedBatch):
    """A packed batch whose keys and values go into a cache."""

    def __init__(
        self,
        cache: DecodeCache,
        rows: Sequence[int],
        sequences: Sequence[Sequence[int]],
        device: Any,
        families: Sequence[PrefixGroup],
    ) -> None:
        import torch

        super().__init__(sequences, device, families)
        longest = cache.columns
        places = [[p for run in runs for p in run] for runs in self.places]
        gather = [p for mine in places for p in ([mine[0]] * (longest - len(mine)) + mine)]
        self._gather, self._rows = torch.tensor(gather, device=device), torch.tensor(rows, device=device)
        self._cache, self._calls = cache, 0

    def attention(self, attend: Any, module: Any, tensors: Sequence[Any], /, **kwargs: Any) -> Any:
        """Do the same as a packed batch, and fill the cache."""
        shape = (len(self._rows), -1)
        key, value = (
            tensor[0].index_select(1, self._gather).unflatten(1, shape).transpose(0, 1) for tensor in tensors[1:]
        )
        self._cache.fill(self._calls, self._rows, key, value)
        self._calls += 1
        return super().attention(attend, module, tensors, **kwargs)


class _Step:
    """The next token of each text in a row, see `PackedBatch`."""

    def __init__(self, cache: DecodeCache, tokens: Any) -> None:
        self.input_ids = tokens.unsqueeze(0)
        self.position_ids, self._mask = cache.begin()
        self._cache, self._calls = cache, 0

    def attention(self, _attend: Any, _module: Any, tensors: Sequence[Any], /, **kwargs: Any) -> Any:
        """Return each token's attention to its text, shape ``(1, texts, heads, head size)``.

        The query heads of one key and value head count as positions of one head, so that nothing is copied.
        """
        from torch.nn.functional import scaled_dot_product_attention

        query, key, value = (tensor[0].transpose(0, 1) for tensor in tensors)
        keys, values = self._cache.grown(self._calls, key, value)
        self._calls += 1
        grouped = query.unflatten(1, (keys.shape[1], -1))
        output = scaled_dot_product_attention(grouped, keys, values, self._mask, scale=kwargs.get("scaling"))
        return output.flatten(1, 2).unsqueeze(0)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
