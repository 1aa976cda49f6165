"""Runs forward passes that compute logits for chosen positions only.

Logits are large: for 2,048 positions and a vocabulary of 262,144 they take 2 GiB in float32. So a model's body runs
once, and its head on a few of the rows at a time. A model that cannot be split runs as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from pytest_sway.backends.hf.hygiene.memory import reuse_freed_memory, trim_heap
from pytest_sway.backends.hf.scoring import batching
from pytest_sway.backends.hf.scoring.alone import RopeRegimes, mixes_texts
from pytest_sway.backends.hf.scoring.body_and_head import joined, padded, split_model
from pytest_sway.backends.hf.sharing.trees import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.backends.hf.scoring.batching import Limits, PrefixGroup
    from pytest_sway.backends.hf.scoring.body_and_head import BodyAndHead
    from pytest_sway.backends.hf.scoring.packing import Row
    from pytest_sway.backends.hf.scoring.trials import Trials
    from pytest_sway.backends.text.tokens import Window

__tracebackhide__ = True

_FEWEST_ROWS: Final = 64
"""The head reads all of its weights for any number of rows. For fewer rows than this, that takes most of its time."""

_PART_BYTES: Final = 8 * 2**20
"""Approximate bytes of logits that exist at once, if they are made for some words at a time."""

_MOST_ROWS: Final = 1024
"""The most rows of logits that are made in parts of the vocabulary. So the head reads its weights once for them all."""

_T = TypeVar("_T")
Reduce: TypeAlias = Callable[[Iterable[Any], Sequence[int], Sequence[int]], Iterable[_T]]


class Forward:
    """The forward passes of one tree.

    Args:
        model: The Hugging Face model.
        runner: The model to call: ``model``, or the ``PeftModel`` around it.
        trials: Results of trials of the model.
        one_text_at_a_time: Whether to pass each text alone.

    Attributes:
        model: The Hugging Face model.
        runner: The model to call.
        config: The model's configuration.
        limits: What one pass may hold.
        virtual_tokens: Positions that an adapter puts before each text.
        positions: The most positions of a text; ``None`` if the config states them.
        rope: Which texts may share a pass.
        settings: Further arguments of a pass.
        spent: Whether a text that the tree has computed changes what it computes from now on.
    """

    def __init__(self, model: Any, runner: Any, trials: Trials, *, one_text_at_a_time: bool = False) -> None:
        self.model = model
        self.runner = runner
        self.config = model.config
        self._trials = trials
        self.virtual_tokens = _virtual_tokens(runner)
        self.positions = _positions(model)
        self.rope = RopeRegimes(model.config, self.virtual_tokens)
        self.spent = False
        self._argument = _last_logits_argument(model)
        self.settings = {"use_cache": False} if runner is model and _has_argument(model, "use_cache") else {}
        self._split: BodyAndHead | None = None
        limits: Limits = batching.CPU if model.device.type == "cpu" else batching.ACCELERATOR
        self.one_text_at_a_time = one_text_at_a_time or mixes_texts(model.config)
        self.limits = replace(limits, tokens=1, few_logits_tokens=1) if self.one_text_at_a_time else limits
        if model.device.type == "cpu":
            reuse_freed_memory()

    @property
    def trials(self) -> Trials:
        """Results of trials of the model, with those of earlier runs."""
        self._trials.recall()
        return self._trials

    @property
    def dtype(self) -> Any:
        """The dtype in which passes compute: autocast's, or else the model's."""
        import torch

        device = self.model.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype

    @property
    def embedded(self) -> int | None:
        """The number of tokens that the model has embeddings for; ``None`` if it cannot be found."""
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        return None if weight is None else int(weight.shape[0])

    def split(self) -> BodyAndHead | None:
        """Return the model in two parts; ``None`` if it cannot be split, or if a ``PeftModel`` must be called."""
        if self._split is None and self.runner is self.model:
            self._split = split_model(self.model, self.trials)
        return self._split

    def packs(self, longest: int) -> bool:
        """Return whether sequences of up to ``longest`` tokens are packed, without padding."""
        split = self.split()
        return split is not None and split.packs(longest)

    def families(self, sequences: Sequence[Sequence[int]]) -> list[PrefixGroup]:
        """Return the prefix groups of sequences that are passed together."""
        if len(sequences) > 1 and self.packs(max(map(len, sequences))):
            limits = self.limits
            return batching.families(sequences, tokens=limits.few_logits_tokens, overhead=limits.overhead)
        return batching.alone(sequences)

    def tokens(self, *, few_logits: bool = False) -> int:
        """Return the most token positions of a pass; fewer if it makes logits for all of them.

        Args:
            few_logits: Whether logits are wanted for less than half of the positions.
        """
        if self.split() is not None:
            return self.limits.few_logits_tokens if few_logits else self.limits.tokens
        four_chunks = self.limits.logits_bytes // self._vocabulary()  # of logits in float32
        return min(self.limits.tokens, max(1, four_chunks))

    def logits(
        self, sequences: Sequence[tuple[Sequence[int], int]], reduce: Reduce[_T], *, in_parts: bool = False
    ) -> list[_T]:
        """Compute the logits of the last positions of several sequences in one pass, and reduce them at once.

        Padding is on the right, and no attention mask is passed: a causal model's own mask hides what comes later.

        Args:
            sequences: Token ids of each sequence, and how many of its last positions are wanted.
            reduce: Called with the logits of some rows: tensors of shape ``(rows, words)`` in the model's dtype, for
                consecutive parts of the vocabulary; with the row of each wanted position among them, where several may
                share a row; and with the number of each such position, counted through all sequences. It returns an
                answer for each. It may overwrite the logits, which are freed after it unless it returns them.
            in_parts: Whether ``reduce`` takes more than one part. Asking for a part may overwrite the one before.

        Returns:
            The answer for each wanted position.

        Raises:
            MaskedError: The model cannot pack these sequences after all. From now on `packs` is False.
        """
        inputs = [ids for ids, _ in sequences]
        split = None if self._makes_few_logits(sequences) else self.split()
        self.spent = self.spent or self.rope.leaves_a_trace(max(map(len, inputs)))
        if split is not None:
            families = self.families(inputs)
            with self._trimmed(sum(family.positions for family in families)):
                states, places = split.hidden(inputs, families)
                wanted = [p for runs, (_, n) in zip(places, sequences, strict=True) for p in _last(runs, n)]
                states = _rows(states, sorted(set(wanted)))
            return self._head_reduced(split, states, wanted, reduce, in_parts)
        longest = max(len(ids) for ids in inputs)
        kept = longest - min(len(ids) - n for ids, n in sequences)
        only = self.settings | ({} if self._argument is None else {self._argument: kept})
        with self._trimmed(longest * len(inputs)):
            logits = self.runner(input_ids=padded(inputs, self.model.device), **only).logits
        width = logits.shape[1]  # includes virtual tokens in front
        ends = [(i + 1) * width - longest + len(ids) for i, ids in enumerate(inputs)]
        wanted = [p for end, (_, n) in zip(ends, sequences, strict=True) for p in range(end - n, end)]
        table = logits.flatten(0, 1)
        return self._reduced(lambda start, end: [_rows(table, wanted[start:end])], wanted, reduce, self._chunk())

    def states(self, row: Row) -> Any:
        """Return the hidden states of a row's tokens, shape ``(positions, hidden size)``, if `packs` allows the row.

        Raises:
            MaskedError: The model cannot pack these sequences after all. From now on `packs` is False.
        """
        with self._trimmed(row.input_ids.shape[1]):
            return self._parts.in_a_row(row)

    def next_logits(self, states: Any) -> Any:
        """Return logits to choose tokens by, shape ``(rows, vocabulary)``, if `packs` allows any row."""
        return self._parts.logits(states, quick=True)

    @property
    def _parts(self) -> BodyAndHead:
        split = self.split()
        if split is None:  # an assert would hand the model to pytest's hooks
            raise RuntimeError("only a model in two parts packs")
        return split

    def shares(self, windows: Sequence[Window]) -> bool:
        """Return whether unpacked windows have one context, to be computed once and kept in a cache."""
        if len(windows) == 1:
            return False
        split = self.split()
        return (
            split is not None
            and not self.one_text_at_a_time
            and len({window.context for window in windows}) == 1
            and all(self.rope.of(len(window.inputs)) == 0 for window in windows)
            and not split.packs(max(len(window.inputs) for window in windows))
            and batching.worth_caching(windows, self.limits.overhead)
            and split.caches
        )

    def window_logits(self, windows: Sequence[Window], reduce: Reduce[_T]) -> list[_T]:
        """Do what `logits` does in parts, for windows. If `shares` allows it, their context is computed once."""
        if self.shares(windows) and (split := self.split()) is not None:
            tails = [window.scored[:-1] for window in windows]
            states = joined(split.hidden_after(windows[0].context, tails, self.limits.cached_tokens))
            return self._head_reduced(split, states, range(len(states)), reduce, in_parts=True)
        return self.logits([(window.inputs, len(window.scored)) for window in windows], reduce, in_parts=True)

    def _makes_few_logits(self, sequences: Sequence[tuple[Sequence[int], int]]) -> bool:
        """Return whether one plain pass of the model answers a single question, so that nothing needs a trial."""
        if len(sequences) > 1:
            return False
        ((ids, wanted),) = sequences
        return (len(ids) if self._argument is None else wanted) <= self._chunk()

    @contextmanager
    def _trimmed(self, positions: int) -> Iterator[None]:
        """Make the heap return unused memory before a pass, and after it what only that pass needed."""
        many = positions >= self.limits.worth_trimming
        if many:
            trim_heap()
        yield
        if many:
            trim_heap()

    def _head_reduced(
        self, split: BodyAndHead, states: Any, wanted: Sequence[int], reduce: Reduce[_T], in_parts: bool
    ) -> list[_T]:
        """Reduce the logits of hidden states, of which there is one for each distinct wanted place, in order."""
        most = self._chunk()
        if in_parts and len(states) > most and split.divides_words:
            return self._reduced(
                lambda start, end: split.logits_in_parts(states[start:end], _PART_BYTES), wanted, reduce, _MOST_ROWS
            )
        return self._reduced(lambda start, end: [split.logits(states[start:end])], wanted, reduce, most)

    def _reduced(
        self, parts_of: Callable[[int, int], Iterable[Any]], wanted: Sequence[int], reduce: Reduce[_T], most: int
    ) -> list[_T]:
        """Reduce the logits of wanted places. The logits of each place are computed once.

        Args:
            parts_of: Returns the logits of the distinct wanted places, sorted, from one index up to another.
            wanted: The place of each wanted position.
            reduce: See `logits`.
            most: The most places to reduce at once.
        """
        row_of = {place: row for row, place in enumerate(sorted(set(wanted)))}
        answers: dict[int, _T] = {}
        in_order = sorted(range(len(wanted)), key=lambda i: wanted[i])
        for number, some in groupby(in_order, key=lambda i: row_of[wanted[i]] // most):
            asked, start = list(some), number * most
            rows = [row_of[wanted[i]] - start for i in asked]
            # No name for the logits here, so that those of some places are freed before the next are made.
            answers |= zip(asked, reduce(parts_of(start, start + most), rows, asked), strict=True)
        return [answers[i] for i in range(len(wanted))]

    def _chunk(self) -> int:
        return max(_FEWEST_ROWS, self.limits.logits_bytes // (4 * self._vocabulary()))

    def _vocabulary(self) -> int:
        return int(getattr(self.config.get_text_config(), "vocab_size", 0) or self.embedded or 1)


def _last(runs: Sequence[range], count: int) -> list[int]:
    """Return the last ``count`` places of some runs, in order."""
    places: list[int] = []
    for run in reversed(runs):
        places = [*run[max(0, len(run) - (count - len(places))) :], *places]
    return places


def _rows(table: Any, wanted: Sequence[int]) -> Any:
    import torch

    return table.index_select(0, torch.tensor(wanted, device=table.device))


def _positions(model: Any) -> int | None:
    """Return the most positions of a text if a model numbers them after the padding token's, as RoBERTa does.

    Such models have more position embeddings than positions, and their configs count the embeddings.
    """
    for name, module in modules_of(model):
        padding, rows = getattr(module, "padding_idx", None), getattr(module, "num_embeddings", None)
        if padding is not None and rows is not None and "position" in name.rpartition(".")[2]:
            return int(rows) - int(padding) - 1
    return None


def _virtual_tokens(runner: Any) -> int:
    """Return how many positions a ``PeftModel`` puts before each text, as prompt, prefix and P-tuning do."""
    config = getattr(runner, "active_peft_config", None)
    return int(getattr(config, "num_virtual_tokens", None) or 0) if getattr(config, "is_prompt_learning", False) else 0


def _last_logits_argument(model: Any) -> str | None:
    return next((name for name in ("logits_to_keep", "num_logits_to_keep") if _has_argument(model, name)), None)


def _has_argument(model: Any, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters
