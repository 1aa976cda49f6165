"""A causal language model in two parts: a body, which makes a hidden state for each position, and a head.

What comes between the two differs from model to model: scalings, soft caps. Therefore the head is never rebuilt here:
the model's own ``forward`` runs, with hidden states standing in for what its body would return. That this gives the
model's own logits is tried on a few tokens before it is used; and so is every other way to run the body.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.scoring import batching, packing
from pytest_sway.backends.hf.scoring.trials import Trials

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_sway.backends.hf.scoring.batching import PrefixGroup

__tracebackhide__ = True

_TRIAL_LENGTH: Final = 4


class BodyAndHead:
    """A model whose body and head can run apart.

    Args:
        model: The whole model.
        trials: What was found out about it, and is filled with what will be.
        body: The part of it that computes hidden states.
        output_class: The class of what the body returns; hidden states are handed to the model in an object of it.
    """

    def __init__(self, model: Any, trials: Trials, body: Any, output_class: Any) -> None:
        self._model = model
        self._trials = trials
        self._body = body
        self._output_class = output_class

    def hidden(
        self, inputs: Sequence[Sequence[int]], families: Sequence[PrefixGroup] | None = None
    ) -> tuple[Any, list[list[range]]]:
        """Return the hidden states of sequences: shape ``(positions, hidden size)``, and in which runs each one's are.

        They go through the model in one row where `packs` allows that, else padded on the right.

        Args:
            inputs: Token ids of each.
            families: Which of them have what they begin with in common, in a row.

        Raises:
            MaskedError: It turns out that `packs` was wrong; from then on it allows nothing.
        """
        longest = max(map(len, inputs))
        if len(inputs) > 1 and self.packs(longest):
            row = packing.PackedBatch(inputs, self._model.device, families)
            try:
                return self._in_a_row(row), row.places
            except packing.MaskedError:  # not in the trial, but in longer texts
                self._trials.longest_packed = 0
                raise
        states = self._body(input_ids=padded(inputs, self._model.device), use_cache=False).last_hidden_state
        return states.flatten(0, 1), [[range(i * longest, i * longest + len(ids))] for i, ids in enumerate(inputs)]

    def packs(self, longest: int) -> bool:
        """Whether sequences of up to ``longest`` tokens can go through the model in one row."""
        if self._trials.longest_packed is None:
            self._trials.longest_packed = packing.longest_packed(self._body.config) if self._keeps_apart() else 0
        return longest <= self._trials.longest_packed

    def _in_a_row(self, row: packing.PackedBatch) -> Any:
        with packing.attending_apart(self._body.config, row):
            output = self._body(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False)
        return output.last_hidden_state[0]

    def _keeps_apart(self) -> bool:
        """Whether a sequence in a row comes to what it comes to alone; tried on a few tokens."""
        if not packing.longest_packed(self._body.config):
            return False
        trial = trial_tokens(self._model)
        inputs = [trial[::-1], trial[1:], *(trial + tail for tail in ((), trial[:2], trial[:1] * 2, trial[2:0:-1]))]
        families = [*batching.alone(inputs[:2]), batching.PrefixGroup([2, 3, 4, 5], len(trial), len(trial) + 5)]
        row = packing.PackedBatch(inputs, self._model.device, families)
        try:
            states = self._in_a_row(row)
        except Exception:  # a model of an unforeseen shape can fail in any way; it still runs padded
            return False
        return all(
            agree(joined([states[run.start : run.stop] for run in places]), self.hidden([ids])[0])
            for places, ids in zip(row.places, inputs, strict=True)
        )

    def logits(self, rows: Any) -> Any:
        """Return the logits of hidden states: from ``(rows, hidden size)``, ``(rows, vocabulary)``."""
        output = self._output_class(last_hidden_state=rows.unsqueeze(0))
        with _standing_in(self._body, output):
            return self._model(input_ids=rows.new_zeros((1, len(rows)), dtype=int), use_cache=False).logits[0]

    def hidden_after(self, context: Sequence[int], tails: Sequence[Sequence[int]], cached_tokens: int) -> list[Any]:
        """Return hidden states of several continuations of one context, which is computed once.

        For models that do not take several texts in a row, such as those with eager attention or a sliding window. Four
        completions of a prompt of 100 tokens are 2.5 times as fast so, 16 of one of 350 tokens ten times.

        Args:
            context: Token ids.
            tails: Token ids that follow it, for each continuation; may be empty.
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
        """Whether continuing from a cache gives what one pass over everything gives; tried when first asked."""
        if self._trials.caches is None:
            trial = trial_tokens(self._model)
            whole, _ = self.hidden([trial])
            try:
                other = self.hidden_after(trial[:-1], [trial[-1:], trial[:2]], 64)[0]
            except Exception:  # a model without a cache, or with one of its own kind, can fail in any way
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
    """Return a model in two parts; ``None`` if none of its modules is a body whose states make its own logits.

    Args:
        model: The model.
        trials: What was found out about it, and is filled with what is found out here.
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
        output_class = _output_class(model, body, ids, whole)
        if output_class is not None and id(body) in names:
            trials.body, trials.output_class, trials.divides = names[id(body)], output_class, True
            return
    trials.divides = False


def _output_class(model: Any, body: Any, ids: Any, whole: Any) -> type | None:
    """The class of what a module returns, if it is a body whose states make the model's logits."""
    try:
        output = body(input_ids=ids, use_cache=False)
        parts = BodyAndHead(model, Trials(), body, type(output)).logits(output.last_hidden_state[0])
    except Exception:  # a model of an unforeseen shape can fail in any way; it still runs as a whole
        return None
    return type(output) if agree(parts, whole) else None


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


def padded(sequences: Sequence[Sequence[int]], device: Any) -> Any:
    """Sequences of equal length: each one's last token goes on, since models warn of padding tokens without a mask."""
    import torch

    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in sequences], device=device)


def trial_tokens(model: Any) -> tuple[int, ...]:
    """Return token ids that every vocabulary has, and that are no padding."""
    padding = getattr(model.config, "pad_token_id", None)
    return tuple(token for token in range(_TRIAL_LENGTH + 1) if token != padding)[:_TRIAL_LENGTH]


def joined(tensors: Sequence[Any]) -> Any:
    """Return tensors one behind the other."""
    import torch

    return torch.cat(list(tensors))
