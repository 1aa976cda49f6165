"""Splits a causal language model into a body, which computes hidden states, and a head.

Models differ in what comes between the two, such as scaling and soft caps. So the head is not rebuilt here. The model's
own ``forward`` runs, and hidden states replace its body's output. A trial on a few tokens shows first that this gives
the model's own logits. Each other way to run the body has a trial, too.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.scoring import batching, packing
from pytest_sway.backends.hf.scoring.output_layer import (
    compute_as_made,
    only_words,
    plain_layer,
    quick_for_few_rows,
)
from pytest_sway.backends.hf.scoring.trials import Trials
from pytest_sway.backends.libraries.out_of_memory import out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_sway.backends.hf.scoring.batching import PrefixGroup

__tracebackhide__ = True

_TRIAL_LENGTH: Final = 4
_WORDS: Final = 256
"""Logits in parts are made for a multiple of this number of words, as matrix products are fastest."""


class BodyAndHead:
    """A model whose body and head can run separately.

    Args:
        model: The whole model.
        trials: Results of trials of the model; new ones are added.
        body: The module that computes hidden states.
        output_class: The class of the body's output. Hidden states are passed to the model in an instance of it.
    """

    def __init__(self, model: Any, trials: Trials, body: Any, output_class: Any) -> None:
        self._model = model
        self._trials = trials
        self._body = body
        self._output_class = output_class

    def hidden(
        self, inputs: Sequence[Sequence[int]], families: Sequence[PrefixGroup] | None = None
    ) -> tuple[Any, list[list[range]]]:
        """Return the hidden states of sequences: shape ``(positions, hidden size)``, and the runs of each in it.

        Sequences are packed into one row if `packs` allows it, else padded on the right.

        Args:
            inputs: Token ids of each sequence.
            families: Which of them share a prefix in a row.

        Raises:
            MaskedError: The model cannot pack these sequences after all. From now on `packs` is False.
        """
        if len(inputs) > 1 and self.packs(max(map(len, inputs))):
            row = packing.PackedBatch(inputs, self._model.device, families)
            return self.in_a_row(row), row.places
        return self._side_by_side(inputs)

    def packs(self, longest: int) -> bool:
        """Return whether sequences of up to ``longest`` tokens can be packed into one row."""
        if self._trials.longest_packed is None:
            self._trials.longest_packed = packing.longest_packed(self._body.config) if self._can_pack() else 0
        return longest <= self._trials.longest_packed

    def _side_by_side(self, inputs: Sequence[Sequence[int]]) -> tuple[Any, list[list[range]]]:
        states = self._body(input_ids=padded(inputs, self._model.device), use_cache=False).last_hidden_state
        width = states.shape[1]
        return states.flatten(0, 1), [[range(i * width, i * width + len(ids))] for i, ids in enumerate(inputs)]

    def in_a_row(self, row: packing.Row) -> Any:
        """Return the hidden states of a row's tokens, shape ``(positions, hidden size)``.

        Raises:
            MaskedError: The model cannot pack these sequences after all. From now on `packs` is False.
        """
        try:
            with packing.attending_apart(self._body.config, row):
                output = self._body(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False)
        except packing.MaskedError:  # the trial's texts were too short to show it
            self._trials.longest_packed = 0
            raise
        return output.last_hidden_state[0]

    def _can_pack(self) -> bool:
        """Return whether a sequence in a row has the same states as alone; tried on a few tokens."""
        if not packing.longest_packed(self._body.config):
            return False
        trial = trial_tokens(self._model)
        inputs = [trial[::-1], trial[1:], *(trial + tail for tail in ((), trial[:2], trial[:1] * 2, trial[2:0:-1]))]
        families = [*batching.alone(inputs[:2]), batching.PrefixGroup([2, 3, 4, 5], len(trial), len(trial) + 5)]
        row = packing.PackedBatch(inputs, self._model.device, families)
        try:
            states = self.in_a_row(row)
            apart, alone = self._side_by_side(inputs)
        except Exception:  # an unknown architecture may raise anything; it still runs padded
            self._trials.failed()
            return False
        return all(
            agree(_at(states, places), _at(apart, others)) for places, others in zip(row.places, alone, strict=True)
        )

    def logits(self, rows: Any, *, quick: bool = False) -> Any:
        """Return the logits of hidden states: ``(rows, vocabulary)`` for ``(rows, hidden size)``.

        Args:
            rows: The hidden states.
            quick: They may differ from the layer's own by rounding, if that is faster; see `quick_for_few_rows`.
        """
        with quick_for_few_rows(self._model) if quick else nullcontext():
            return self._logits(rows)

    def logits_in_parts(self, rows: Any, nbytes: int) -> Iterator[Any]:
        """Yield the logits of hidden states for some words at a time, in order, if `divides_words` allows it.

        Each part may be in the memory of the one before.

        Args:
            rows: The hidden states, shape ``(rows, hidden size)``.
            nbytes: About how many bytes of logits to make at once.
        """
        layer = plain_layer(self._model)
        width = max(1, nbytes // (rows.element_size() * len(rows)) // _WORDS) * _WORDS
        memory = rows.new_empty(len(rows) * min(width, len(layer.weight)))
        for start in range(0, len(layer.weight), width):
            with only_words(layer, start, start + width, memory):
                part = self._logits(rows)
            yield part

    @property
    def divides_words(self) -> bool:
        """Whether the logits of some words are the same without the others'; tried when it is first read."""
        layer = plain_layer(self._model)
        if layer is None or not compute_as_made(self._model, layer):
            return False
        if self._trials.divides_words is None:
            states, _ = self._side_by_side([trial_tokens(self._model)])
            whole = self._logits(states)
            try:
                nbytes = whole.nbytes // 3
                parts = [part.clone() for part in self.logits_in_parts(states, nbytes)]
                self._trials.divides_words = len(parts) > 1 and agree(joined([part.t() for part in parts]).t(), whole)
            except Exception as error:  # an unknown architecture may raise anything; it still runs as a whole
                if out_of_memory(error):
                    return False
                self._trials.failed()
                self._trials.divides_words = False
        return self._trials.divides_words

    def _logits(self, rows: Any) -> Any:
        output = self._output_class(last_hidden_state=rows.unsqueeze(0))
        with _returning(self._body, output):
            return self._model(input_ids=rows.new_zeros((1, len(rows)), dtype=int), use_cache=False).logits[0]

    def hidden_after(self, context: Sequence[int], tails: Sequence[Sequence[int]], cached_tokens: int) -> list[Any]:
        """Return the hidden states of several continuations of one context, which is computed once.

        This is for models that cannot pack, such as those with eager attention or a sliding window. It makes four
        completions of a prompt of 100 tokens 2.5 times as fast, and 16 of a prompt of 350 tokens 10 times.

        Args:
            context: Token ids.
            tails: Token ids of each continuation; may be empty.
            cached_tokens: The most positions that copies of the context's key-value cache may hold at once.

        Returns:
            For each continuation a tensor of shape ``(1 + length, hidden size)``: the state at the context's last
            position, then those of the continuation.
        """
        output = self._body(input_ids=padded([context], self._model.device), use_cache=True)
        field = "cache" if "cache" in output else "past_key_values"  # the name before transformers 5.24
        last, cache = output.last_hidden_state[0, -1:], output[field]
        states = [last] * len(tails)
        longer = sorted((i for i, tail in enumerate(tails) if tail), key=lambda i: len(tails[i]))
        while longer:
            rows = max(1, cached_tokens // (len(context) + len(tails[longer[-1]])))
            now, longer = longer[-rows:], longer[:-rows]
            ours = copy.deepcopy(cache) if longer else cache
            for i, hidden in zip(now, self._continued(field, ours, [tails[i] for i in now]), strict=True):
                states[i] = joined([last, hidden[: len(tails[i])]])
        return states

    @property
    def caches(self) -> bool:
        """Whether continuing from a cache gives the same as one pass; tried when it is first read."""
        if self._trials.caches is None:
            trial = trial_tokens(self._model)
            whole, _ = self.hidden([trial])
            try:
                other = self.hidden_after(trial[:-1], [trial[-1:], trial[:2]], 64)[0]
            except Exception as error:  # a model without a cache, or with one of its own kind, can fail in any way
                if out_of_memory(error):  # which shows nothing of the model: the next call tries again
                    return False
                self._trials.failed()
                self._trials.caches = False
            else:
                self._trials.caches = agree(other, whole[-2:])
        return self._trials.caches

    def _continued(self, field: str, cache: Any, tails: Sequence[Sequence[int]]) -> Any:
        inputs = padded(tails, self._model.device)
        if len(tails) > 1:
            cache.reorder_cache(inputs.new_zeros(len(tails)))
        return self._body(input_ids=inputs, **{field: cache}, use_cache=True).last_hidden_state


def split_model(model: Any, trials: Trials) -> BodyAndHead | None:
    """Return a model in two parts; ``None`` if the states of no module give the model's logits.

    Args:
        model: The model.
        trials: Results of trials of the model; new ones are added.
    """
    if trials.divides is None:
        _try_to_divide(model, trials)
    if not trials.divides:
        return None
    return BodyAndHead(model, trials, model.get_submodule(trials.body), trials.output_class)


def _try_to_divide(model: Any, trials: Trials) -> None:
    import torch

    ids = torch.tensor([trial_tokens(model)], device=model.device)
    whole = model(input_ids=ids, use_cache=False).logits[0]
    names = {id(module): name for name, module in model.named_modules()}
    bodies = [body for body in dict.fromkeys((model.get_decoder(), model.base_model)) if body not in (None, model)]
    for body in bodies:
        output_class = _output_class(model, body, ids, whole, trials)
        if output_class is not None and id(body) in names:
            trials.body, trials.output_class, trials.divides = names[id(body)], output_class, True
            return
    trials.divides = False


def _output_class(model: Any, body: Any, ids: Any, whole: Any, trials: Trials) -> type | None:
    """Return the class of a module's output, if it is a body whose states give the model's logits."""
    try:
        output = body(input_ids=ids, use_cache=False)
        parts = BodyAndHead(model, Trials(), body, type(output)).logits(output.last_hidden_state[0])
    except Exception:  # an unknown architecture may raise anything; it still runs as a whole
        trials.failed()
        return None
    return type(output) if agree(parts, whole) else None


@contextmanager
def _returning(body: Any, output: Any) -> Iterator[None]:
    """Make ``body`` return ``output`` for any arguments."""
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


def agree(one: Any, other: Any, dtype: Any = None) -> bool:
    """Return whether two tensors are equal but for rounding, relative to the largest number of the second.

    Args:
        one: The first tensor.
        other: The second one.
        dtype: The dtype of the passes that computed them; ``None`` if they still have it.
    """
    tolerance = {4: 1e-4, 8: 1e-4}.get((dtype or one.dtype).itemsize, 5e-2)
    scale = float(other.abs().max())
    return one.shape == other.shape and bool(((one - other).abs() <= tolerance * max(scale, 1e-6)).all())


def padded(sequences: Sequence[Sequence[int]], device: Any) -> Any:
    """Return sequences as a tensor, padded with each one's last token: models warn of padding tokens without a mask."""
    import torch

    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in sequences], device=device)


def trial_tokens(model: Any) -> tuple[int, ...]:
    """Return token ids that every vocabulary has and that are not padding."""
    padding = getattr(model.config, "pad_token_id", None)
    return tuple(token for token in range(_TRIAL_LENGTH + 1) if token != padding)[:_TRIAL_LENGTH]


def _at(states: Any, runs: Sequence[range]) -> Any:
    """Return the states in some runs of rows."""
    return joined([states[run.start : run.stop] for run in runs])


def joined(tensors: Sequence[Any]) -> Any:
    """Return tensors concatenated along their first dimension."""
    import torch

    return torch.cat(list(tensors))
