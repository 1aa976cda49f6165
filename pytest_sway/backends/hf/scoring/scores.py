"""Computes log-probabilities of texts: tokenises, plans batches, runs the model, restores the order.

Nothing here knows of adapters or locks. A view's ``run(work, *args)`` returns ``work(engine, *args)`` with the model in
the view's state, and keeps other calls off that model meanwhile. It is called once per batch, so that other calls can
run between batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from pytest_sway.backends.hf.scoring import batching
from pytest_sway.backends.hf.scoring.answer_cache import recalling
from pytest_sway.backends.hf.scoring.batching import in_halves
from pytest_sway.backends.hf.scoring.engine import Engine, no_number
from pytest_sway.backends.hf.scoring.packing import MaskedError
from pytest_sway.backends.text import tokens as tokenisation
from pytest_sway.backends.text.requests import encoded_pairs, encoded_prompts, encoded_texts, rolling, warn_of_cuts
from pytest_sway.backends.text.tokens import Ids, Window
from pytest_sway.protocols import RollingLogprob, TokenDist, log_of_tail

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_sway.protocols import Prompt

__tracebackhide__ = True

Run = Callable[..., Any]
_T = TypeVar("_T")

_SLICE_BYTES: Final = 2**23
"""Bytes of logits that are normalised at once on a CPU: they fit in its cache, and are work for all cores."""


def logprobs_of(run: Run, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
    """Return the summed log-probability of each completion's tokens given its prompt, in nats, in the pairs' order."""
    encoded, max_length = run(encoded_pairs, pairs)
    windows = [tokenisation.cut_left(window, max_length) for window in encoded]
    warn_of_cuts(sum(a != b for a, b in zip(windows, encoded, strict=True)), max_length)
    found = _scored(run, windows)
    return [float(found[window].sum()) for window in windows]


def rolling_logprobs(run: Run, texts: Sequence[str], prefix: bool) -> list[RollingLogprob]:
    """Return the log-probability of each token of each text given those before it, in nats, in the texts' order."""
    encoded, max_length = run(encoded_texts, texts, prefix)
    rolled = [(ids, list(tokenisation.rolling_windows(ids, max_length))) for ids in encoded]
    found = _scored(run, [window for _, windows in rolled for window in windows])
    return [rolling(ids, [found[window] for window in windows]) for ids, windows in rolled]


def next_token_dists(run: Run, prompts: Sequence[Prompt], top_k: int) -> list[TokenDist]:
    """Return the distribution of each prompt's next token, cut to the ``top_k`` most probable, in prompt order."""
    encoded, max_length = run(encoded_prompts, prompts)
    read: list[Ids] = [ids[-max_length:] for ids in encoded]
    warn_of_cuts(sum(len(ids) > max_length for ids in encoded), max_length)
    found = _answered(run, _planned_prompts, _dists, list(dict.fromkeys(read)), top_k)
    return [found[ids] for ids in read]


# --- what runs with the engine --------------------------------------------------------------------------------------


def _planned_prompts(engine: Engine, prompts: Sequence[Ids]) -> list[list[Ids]]:
    return _planned(engine, prompts, [(ids, 1) for ids in prompts])


def _planned_windows(engine: Engine, windows: Sequence[Window]) -> list[list[Window]]:
    sharing: list[list[Window]] = []
    others: list[Window] = []
    for group in batching.by_context(windows):
        if engine.forward.shares(group):
            lengths, tokens = [len(window.scored) for window in group], engine.forward.limits.cached_tokens
            sharing += [[group[i] for i in part] for part in batching.in_turn(range(len(group)), lengths, tokens)]
        else:
            others += group
    return sharing + _planned(engine, others, [(window.inputs, len(window.scored)) for window in others])


def _planned(engine: Engine, items: Sequence[_T], sequences: Sequence[tuple[Ids, int]]) -> list[list[_T]]:
    """Divide items into batches, in which items of one prefix group are neighbours.

    Args:
        engine: Computes the items.
        items: The items to divide.
        sequences: For each item its token ids, and the number of positions for which logits are wanted.
    """
    forward, planned = engine.forward, []
    if len(items) == 1:
        return [list(items)]
    kinds = [(forward.packs(len(ids)), forward.rope.of(len(ids))) for ids, _ in sequences]
    for kind in dict.fromkeys(kinds):
        packs, _ = kind
        chosen = [i for i, its in enumerate(kinds) if its == kind]
        families = forward.families([sequences[i][0] for i in chosen])
        lengths = [family.positions for family in families]
        few_logits = 2 * sum(sequences[i][1] for i in chosen) < sum(lengths)
        tokens = forward.tokens(few_logits=few_logits)
        overhead = forward.limits.overhead
        for batch in batching.in_batches(lengths, tokens=tokens, overhead=overhead, padded=not packs):
            planned.append([items[chosen[i]] for f in batch for i in families[f].members])
    return planned


@recalling
def _window_logprobs(engine: Engine, windows: Sequence[Window]) -> list[NDArray[np.float32]]:
    targets = [token for window in windows for token in window.scored]

    def reduce(parts: Iterable[Any], rows: Sequence[int], asked: Sequence[int]) -> list[float]:
        return _chosen_logprobs(parts, rows, [targets[i] for i in asked])

    flat = np.array(engine.forward.window_logits(windows, reduce), dtype=np.float32)
    if np.isnan(flat).any():
        raise no_number(engine)
    return np.split(flat, np.cumsum([len(window.scored) for window in windows])[:-1])


@recalling
def _dists(engine: Engine, prompts: Sequence[Ids], top_k: int) -> list[TokenDist]:
    def reduce(parts: Iterable[Any], rows: Sequence[int], _: Sequence[int]) -> list[TokenDist]:
        (logits,) = parts
        found = _most_probable(logits, top_k)
        return [found[row] for row in rows]

    dists = engine.forward.logits([(ids, 1) for ids in prompts], reduce)
    if any(np.isnan(dist.logprobs[0]) for dist in dists):
        raise no_number(engine)
    return dists


def next_logits(engine: Engine, prompts: Sequence[Ids]) -> Iterator[tuple[Ids, Any]]:
    """Yield each prompt with the float32 logits of the token after it, shape ``(vocabulary,)``.

    Args:
        engine: Computes them as for `next_token_dists`.
        prompts: Token ids of each prompt; no two are equal.
    """
    for batch in _planned_prompts(engine, prompts):
        try:
            found = engine.forward.logits([(ids, 1) for ids in batch], _as_floats)
        except MaskedError:  # as in `_answered`
            yield from next_logits(engine, batch)
        else:
            yield from zip(batch, found, strict=True)


# --- from logits to answers -----------------------------------------------------------------------------------------


def _scored(run: Run, windows: Iterable[Window]) -> dict[Window, NDArray[np.float32]]:
    return _answered(run, _planned_windows, _window_logprobs, list(dict.fromkeys(windows)))


def _answered(run: Run, plan: Any, work: Any, items: Sequence[Any], *args: Any) -> dict[Any, Any]:
    """Return the answer of ``work`` for each item, in batches that ``plan`` makes."""
    found: dict[Any, Any] = {}
    for batch in run(plan, items):
        try:
            found |= zip(batch, in_halves(run, work, batch, *args), strict=True)
        except MaskedError:  # the model cannot pack this batch after all; the next plan does not pack it
            found |= _answered(run, plan, work, batch, *args)
    return found


def _chosen_logprobs(parts: Iterable[Any], rows: Sequence[int], targets: Sequence[int]) -> list[float]:
    """Return the log-probability of each target in its row, in nats, computed in float32. Overwrites the logits.

    On a CPU, a few rows at a time are normalised, while they are in its cache.

    Args:
        parts: The logits, shape ``(rows, words)``, for consecutive parts of the vocabulary.
        rows: The row of each target.
        targets: Token ids.
    """
    import torch

    row, target = np.array(rows), np.array(targets)
    chosen, highest, sums = [], [], []
    start, lowest = 0, torch.finfo(torch.float32).min
    for logits in parts:
        width, device = logits.shape[-1], logits.device
        here = np.flatnonzero((start <= target) & (target < start + width))
        at = (torch.tensor(indices, device=device) for indices in (row[here], target[here] - start))
        chosen.append((here, logits[*at].float()))
        at_once = max(1, _SLICE_BYTES // (4 * width)) if device.type == "cpu" else len(logits)
        tops, totals = [], []
        for some in logits.split(at_once):
            numbers = some.float()
            tops.append(numbers.amax(-1).clamp_(min=lowest))  # all words of a part may be at minus infinity
            totals.append(numbers.sub_(tops[-1].unsqueeze(-1)).exp_().sum(-1))
        highest.append(torch.cat(tops))
        sums.append(torch.cat(totals))
        start += width
    order = torch.tensor(np.argsort(np.concatenate([here for here, _ in chosen])), device=device)
    tops_of_parts = torch.stack(highest)
    top = tops_of_parts.amax(0)
    logs = (torch.stack(sums) * (tops_of_parts - top).exp()).sum(0).log()
    its_row = torch.tensor(row, device=device)
    logprobs: list[float] = (torch.cat([some for _, some in chosen])[order] - top[its_row] - logs[its_row]).tolist()
    return logprobs


def _as_floats(parts: Iterable[Any], rows: Sequence[int], _: Sequence[int]) -> Any:
    (logits,) = parts
    return logits[rows].float()


def _most_probable(logits: Any, top_k: int) -> list[TokenDist]:
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    vocabulary = int(logprobs.shape[-1])
    top = torch.topk(logprobs, k=min(top_k, vocabulary))
    rests = (1.0 - torch.exp(top.values).sum(-1)).tolist()
    return [
        TokenDist(ids.copy(), values.copy(), vocabulary, None if top_k >= vocabulary else log_of_tail(rest))
        for ids, values, rest in zip(top.indices.cpu().numpy(), top.values.cpu().numpy(), rests, strict=True)
    ]
