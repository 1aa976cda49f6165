"""Forward passes that compute the logits of chosen positions, and no others.

A causal language model is a body, which makes a hidden state for each position, and a head, which makes logits of
it. The head's answer is the large one: 2,048 positions of a vocabulary of 262,144 are 2 GiB in float32. So the body
runs once, and the head on a few of its rows at a time.

What comes between the two differs from model to model: scalings, soft caps. Therefore the head is never rebuilt here:
the model's own ``forward`` runs, with hidden states standing in for what its body would return. That this gives the
model's own logits is tried on a few tokens before it is used; where it does not, the model runs as a whole.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pytest_sway.backends.hf import batches, packing
from pytest_sway.backends.hf.memory import reuse_freed_memory, trim_heap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_sway.backends.hf.batches import Limits
    from pytest_sway.backends.hf.tokenisation import Window

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_FEWEST_ROWS: Final = 64
"""The head reads all of its weights for any number of rows; for fewer than these, that takes most of its time."""

_TRIAL_LENGTH: Final = 4

_T = TypeVar("_T")


class SplitModel:
    """A model whose body and head can run apart.

    Args:
        model: The whole model.
        body: The part of it that computes hidden states.
        output: What the body returned; hidden states are handed to the model in an object of its class.
    """

    def __init__(self, model: Any, body: Any, output: Any) -> None:
        self._model = model
        self._body = body
        self._output_class = type(output)
        self._caches: bool | None = None
        self._longest_packed: int | None = None

    def hidden(self, inputs: Sequence[Sequence[int]]) -> tuple[Any, list[int]]:
        """Return the hidden states of sequences: shape ``(positions, hidden size)``, and where each one's begin.

        They go through the model in one row where `packs` allows that, else padded on the right.
        """
        longest = max(map(len, inputs))
        if len(inputs) > 1 and self.packs(longest):
            row = packing.Row(inputs, self._model.device)
            states = self.hidden_in(row)
            if states is not None:
                return states, row.starts
        states = self._body(input_ids=_padded(inputs, self._model.device), use_cache=False).last_hidden_state
        return states.flatten(0, 1), [i * longest for i in range(len(inputs))]

    def packs(self, longest: int) -> bool:
        """Whether sequences of up to ``longest`` tokens can go through the model in one row."""
        if self._longest_packed is None:
            self._longest_packed = packing.longest_packed(self._body.config) if self._keeps_apart() else 0
        return longest <= self._longest_packed

    def hidden_in(self, row: packing.Row) -> Any | None:
        """Return the hidden states of a row, shape ``(positions, hidden size)``; ``None`` if the model masks more."""
        try:
            return self._in_a_row(row)
        except packing.MaskedError:  # not in the trial, but in longer texts
            self._longest_packed = 0
            return None

    def _in_a_row(self, row: packing.Row) -> Any:
        with packing.attending_apart(self._body.config, row):
            output = self._body(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False)
        return output.last_hidden_state[0]

    def _keeps_apart(self) -> bool:
        """Whether a sequence in a row comes to what it comes to alone; tried on a few tokens."""
        if not packing.longest_packed(self._body.config):
            return False
        trial = _trial(self._model)
        inputs = [trial, trial[::-1], trial[1:], trial[:1]]
        tails = [trial[:1], (), trial[2:0:-1]]
        row = packing.Row(inputs, self._model.device, {0: tails, 3: tails[:1]})
        try:
            states = self._in_a_row(row)
        except Exception:  # a model of an unforeseen shape can fail in any way; it still runs padded
            return False
        alone = [(row.starts[i], ids, len(ids)) for i, ids in enumerate(inputs)]
        alone += [
            (start, inputs[i] + tail, len(tail))
            for i, starts in row.continued.items()
            for start, tail in zip(starts, tails, strict=False)
        ]
        return all(agree(states[start : start + n], self.hidden([ids])[0][-n:]) for start, ids, n in alone if n)

    def logits(self, rows: Any) -> Any:
        """Return the logits of hidden states: from ``(rows, hidden size)``, ``(rows, vocabulary)``."""
        output = self._output_class(last_hidden_state=rows.unsqueeze(0))
        with _standing_in(self._body, output):
            return self._model(input_ids=rows.new_zeros((1, len(rows)), dtype=int), use_cache=False).logits[0]

    def hidden_after(self, context: Sequence[int], tails: Sequence[Sequence[int]], cached_tokens: int) -> list[Any]:
        """Return hidden states of several continuations of one context, which is computed once.

        Args:
            context: Token ids.
            tails: Token ids that follow it, for each continuation; may be empty.
            cached_tokens: The most positions that copies of the context's key-value cache may hold at once.

        Returns:
            For each continuation a tensor of shape ``(1 + length, hidden size)``: the state at the context's last
            position, then those of the continuation.
        """
        output = self._body(input_ids=_padded([context], self._model.device), use_cache=True)
        field = "cache" if "cache" in output else "past_key_values"  # the name before transformers 5.24
        last, cache = output.last_hidden_state[0, -1:], output[field]
        states = [last] * len(tails)
        longer = sorted((i for i, tail in enumerate(tails) if tail), key=lambda i: len(tails[i]))
        while longer:
            rows = max(1, cached_tokens // (len(context) + len(tails[longer[-1]])))
            now, longer = longer[-rows:], longer[:-rows]
            ours = copy.deepcopy(cache) if longer else cache
            for i, hidden in zip(now, self._continued(field, ours, [tails[i] for i in now]), strict=True):
                states[i] = _joined([last, hidden[: len(tails[i])]])
        return states

    @property
    def caches(self) -> bool:
        """Whether continuing from a cache gives what one pass over everything gives; tried when first asked."""
        if self._caches is None:
            trial = _trial(self._model)
            whole, _ = self.hidden([trial])
            try:
                other = self.hidden_after(trial[:-1], [trial[-1:], trial[:2]], 64)[0]
            except Exception:  # a model without a cache, or with one of its own kind, can fail in any way
                self._caches = False
            else:
                self._caches = agree(other, whole[-2:])
        return self._caches

    def _continued(self, field: str, cache: Any, tails: Sequence[Sequence[int]]) -> Any:
        inputs = _padded(tails, self._model.device)
        if len(tails) > 1:
            cache.reorder_cache(inputs.new_zeros(len(tails)))
        return self._body(input_ids=inputs, **{field: cache}, use_cache=True).last_hidden_state


class Forward:
    """The forward passes of one loaded base.

    Args:
        model: The Hugging Face model.

    Attributes:
        model: The model.
        config: Its configuration.
        limits: What one pass may hold.
        pads_left: Whether prompts padded on the left go on as they do alone; ``None`` until that was tried.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self._argument = _last_logits_argument(model)
        self._split: SplitModel | None = None
        self._tried = False
        self.pads_left: bool | None = None
        self.limits: Limits = batches.CPU if model.device.type == "cpu" else batches.ACCELERATOR
        reuse_freed_memory()

    @property
    def embedded(self) -> int | None:
        """How many tokens the model has embeddings for; ``None`` if that cannot be told."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        return None if weight is None else int(weight.shape[0])

    def split(self, runner: Any) -> SplitModel | None:
        """Return the model in two parts; ``None`` where ``runner`` is not the model itself, or cannot be divided."""
        if runner is not self.model:
            return None
        if not self._tried:
            self._split, self._tried = _split(self.model), True
        return self._split

    def packs(self, runner: Any, longest: int) -> bool:
        """Whether sequences of up to ``longest`` tokens are passed without padding."""
        split = self.split(runner)
        return split is not None and split.packs(longest)

    def tokens(self, runner: Any, *, few_logits: bool = False) -> int:
        """Return how many token positions a pass may have: fewer where it makes logits for each of them.

        Args:
            runner: The model, or the ``PeftModel`` around it.
            few_logits: The logits of less than half of the positions are wanted.
        """
        if self.split(runner) is not None:
            return self.limits.few_logits_tokens if few_logits else self.limits.tokens
        return min(self.limits.tokens, max(1, 4 * self.limits.logits_bytes // (4 * self._vocabulary())))

    def logits(
        self, runner: Any, sequences: Sequence[tuple[Sequence[int], int]], reduce: Callable[[Any, int], _T]
    ) -> list[_T]:
        """Compute the logits of the last positions of several sequences in one pass, and reduce them at once.

        Sequences that are padded are so on the right, and no attention mask is passed: what comes later is hidden from
        a causal model by its own mask.

        Args:
            runner: The model, or the ``PeftModel`` around it.
            sequences: Token ids, and how many of their last positions are wanted.
            reduce: Called with logits of a few positions, and the number of positions that came before. In order
                these are all wanted positions of the first sequence, of the second, and so on. The logits, of shape
                ``(positions, vocabulary)`` and in the model's dtype, are its to overwrite, and freed after it unless
                it returns them.

        Returns:
            What ``reduce`` returned.
        """
        split = self.split(runner)
        inputs = [ids for ids, _ in sequences]
        if split is not None:
            with self._trimmed(sum(map(len, inputs))):
                rows = self._rows_of(split, sequences)
            return self._heads(split, rows, reduce)
        longest = max(len(ids) for ids in inputs)
        kept = longest - min(len(ids) - n for ids, n in sequences)
        only = {} if self._argument is None else {self._argument: kept}
        logits = runner(input_ids=_padded(inputs, self.model.device), **only).logits
        width = logits.shape[1]  # with virtual tokens in front, more than were passed
        wanted = [p for i, (ids, n) in enumerate(sequences) for p in _last((i + 1) * width - longest + len(ids), n)]
        rows, chunk = logits.flatten(0, 1), self._chunk()
        return [reduce(_rows(rows, wanted[at : at + chunk]), at) for at in range(0, len(wanted), chunk)]

    def shares(self, runner: Any, windows: Sequence[Window]) -> bool:
        """Whether windows that are not packed have one context, which will be computed once and kept in a cache."""
        split = self.split(runner)
        return (
            split is not None
            and len({window.context for window in windows}) == 1
            and batches.worth_sharing(windows, 2 * self.limits.overhead)
            and split.caches
        )

    def window_logits(self, runner: Any, windows: Sequence[Window], reduce: Callable[[Any, int], _T]) -> list[_T]:
        """Do what `logits` does for windows; neighbours of one context have it computed once, where that pays."""
        split, longest = self.split(runner), max(len(window.inputs) for window in windows)
        if split is not None and split.packs(longest):
            families = batches.families(windows, self.limits)
            if len(families) < len(windows):
                with self._trimmed(sum(map(batches.positions, families))):
                    rows = self._rows_of_families(split, families)
                if rows is not None:
                    return self._heads(split, rows, reduce)
        if split is not None and not split.packs(longest) and self.shares(runner, windows):
            tails = [window.scored[:-1] for window in windows]
            states = split.hidden_after(windows[0].context, tails, self.limits.cached_tokens)
            return self._heads(split, _joined(states), reduce)
        return self.logits(runner, [(window.inputs, len(window.scored)) for window in windows], reduce)

    def _rows_of(self, split: SplitModel, sequences: Sequence[tuple[Sequence[int], int]]) -> Any:
        states, starts = split.hidden([ids for ids, _ in sequences])
        wanted = [p for start, (ids, n) in zip(starts, sequences, strict=True) for p in _last(start + len(ids), n)]
        return _rows(states, wanted)

    def _rows_of_families(self, split: SplitModel, families: Sequence[Sequence[Window]]) -> Any | None:
        shared = {i: family for i, family in enumerate(families) if len(family) > 1}
        row = packing.Row(
            [family[0].context if i in shared else family[0].inputs for i, family in enumerate(families)],
            self.model.device,
            {i: [window.scored[:-1] for window in family] for i, family in shared.items()},
        )
        states = split.hidden_in(row)
        if states is None:
            return None
        wanted: list[int] = []
        for i, family in enumerate(families):
            if i not in shared:
                wanted += _last(row.starts[i] + len(family[0].inputs), len(family[0].scored))
                continue
            context_end = row.starts[i] + len(family[0].context)
            for start, window in zip(row.continued[i], family, strict=True):
                wanted += [context_end - 1, *range(start, start + len(window.scored) - 1)]
        return _rows(states, wanted)

    @contextmanager
    def _trimmed(self, positions: int) -> Iterator[None]:
        """Have the heap give back what was in use before a body's pass, and after it what only that needed."""
        many = positions >= self.limits.worth_trimming
        if many:
            trim_heap()
        yield
        if many:
            trim_heap()

    def _heads(self, split: SplitModel, rows: Any, reduce: Callable[[Any, int], _T]) -> list[_T]:
        chunk = self._chunk()
        return [reduce(split.logits(some), i * chunk) for i, some in enumerate(rows.split(chunk))]

    def _chunk(self) -> int:
        return max(_FEWEST_ROWS, self.limits.logits_bytes // (4 * self._vocabulary()))

    def _vocabulary(self) -> int:
        return int(getattr(self.config.get_text_config(), "vocab_size", 0) or self.embedded or 1)


def _split(model: Any) -> SplitModel | None:
    import torch

    trial = torch.tensor([_trial(model)], device=model.device)
    whole = model(input_ids=trial, use_cache=False).logits[0]
    bodies = [body for body in dict.fromkeys((model.get_decoder(), model.base_model)) if body not in (None, model)]
    return next((split for body in bodies if (split := _split_at(model, body, trial, whole)) is not None), None)


def _split_at(model: Any, body: Any, trial: Any, whole: Any) -> SplitModel | None:
    try:
        output = body(input_ids=trial, use_cache=False)
        split = SplitModel(model, body, output)
        parts = split.logits(output.last_hidden_state[0])
    except Exception:  # a model of an unforeseen shape can fail in any way; it still runs as a whole
        return None
    return split if agree(parts, whole) else None


@contextmanager
def _standing_in(body: Any, output: Any) -> Iterator[None]:
    """Have ``body`` return ``output``, whatever it is called with."""
    attributes = body.__dict__
    before = attributes.get("forward")
    attributes["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before


def agree(one: Any, other: Any) -> bool:
    """Whether two ways to compute a tensor come to the same, but for rounding."""
    tolerance = {4: 1e-4, 8: 1e-4}.get(one.element_size(), 5e-2)
    scale = float(other.abs().max())
    return one.shape == other.shape and bool(((one - other).abs() <= tolerance * max(scale, 1e-6)).all())


def _padded(sequences: Sequence[Sequence[int]], device: Any) -> Any:
    """Sequences of equal length: each one's last token goes on, since models warn of padding tokens without a mask."""
    import torch

    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in sequences], device=device)


def _trial(model: Any) -> tuple[int, ...]:
    """Token ids that every vocabulary has, and that are no padding."""
    padding = getattr(model.config, "pad_token_id", None)
    return tuple(token for token in range(_TRIAL_LENGTH + 1) if token != padding)[:_TRIAL_LENGTH]


def _last(end: int, count: int) -> range:
    return range(end - count, end)


def _rows(table: Any, wanted: Sequence[int]) -> Any:
    import torch

    return table.index_select(0, torch.tensor(wanted, device=table.device))


def _joined(tensors: Sequence[Any]) -> Any:
    import torch

    return torch.cat(list(tensors))


def _last_logits_argument(model: Any) -> str | None:
    import inspect

    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("logits_to_keep", "num_logits_to_keep") if name in parameters), None)
