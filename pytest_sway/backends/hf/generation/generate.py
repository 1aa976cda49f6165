"""Generates text, greedy or sampled. Of the base's generation settings, only the end tokens are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_sway.backends.hf.generation.continuing import Request, Stops, continued, recomputed
from pytest_sway.backends.hf.generation.decoding import decoded, most_texts
from pytest_sway.backends.hf.generation.trials import ALONE, EQUAL, PADDED, continues, decodes
from pytest_sway.backends.hf.scoring import batching
from pytest_sway.backends.hf.scoring.batching import in_halves
from pytest_sway.backends.hf.scoring.engine import Engine
from pytest_sway.backends.hf.scoring.packing import MaskedError
from pytest_sway.backends.text.requests import encoded_prompts, warn_of_cuts
from pytest_sway.backends.text.stopping import ends_of, stopped_text

if TYPE_CHECKING:
    from pytest_sway.backends.hf.scoring.scores import Run
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Prompt

__tracebackhide__ = True


class Batch(NamedTuple):
    """Requests that are continued together, and the function that does it."""

    work: Callable[..., list[Any]]
    requests: list[Request]


def generate_many(run: Run, prompts: Sequence[Prompt], settings: SamplingParams, seeds: Sequence[int]) -> list[str]:
    """Return the continuation of each prompt from its seed, in the prompts' order."""
    encoded, max_length = run(encoded_prompts, prompts)
    room = settings.room(max_length)
    warn_of_cuts(sum(len(ids) > room for ids in encoded), room)
    requests = [
        Request(ids[-room:], seed if settings.temperature > 0.0 else None)
        for ids, seed in zip(encoded, seeds, strict=True)
    ]
    found = _continued(run, list(dict.fromkeys(requests)), settings, run(stops_of))
    texts: list[str] = run(decoded_texts, [found[request] for request in requests], settings.stop)
    return texts


def _continued(
    run: Run, requests: Sequence[Request], settings: SamplingParams, stops: Stops
) -> dict[Request, tuple[int, ...]]:
    found: dict[Request, tuple[int, ...]] = {}
    for work, batch in run(_planned, requests, settings):
        try:
            found |= zip(batch, in_halves(run, work, batch, settings, stops), strict=True)
        except MaskedError:  # the model cannot pack this batch after all; the next plan does not pack it
            found |= _continued(run, batch, settings, stops)
    return found


def _planned(engine: Engine, requests: Sequence[Request], settings: SamplingParams) -> list[Batch]:
    longest = [len(request.ids) + settings.max_new_tokens for request in requests]
    columns = engine.forward.limits.attention_columns
    in_rows = [_goes_in_rows(engine, length) for length in longest]
    together = [request for request, goes in zip(requests, in_rows, strict=True) if goes]
    if together and not decodes(engine):
        return _planned_apart(engine, requests, settings)
    limits = engine.forward.limits
    least = limits.decoded_tokens // most_texts(engine.forward)
    overhead = limits.overhead * settings.max_new_tokens  # each new token is a pass
    widths = [-(-length // columns) * columns for length, goes in zip(longest, in_rows, strict=True) if goes]
    lengths = [max(least, width) for width in widths]
    batches = batching.in_batches(lengths, tokens=limits.decoded_tokens, overhead=overhead)
    planned = [Batch(decoded, [together[i] for i in batch]) for batch in batches]
    apart = [request for request, goes in zip(requests, in_rows, strict=True) if not goes]
    return planned + (_planned_apart(engine, apart, settings) if apart else [])


def _goes_in_rows(engine: Engine, length: int) -> bool:
    """Return whether a text that grows to this length goes through the model in a row with others."""
    forward = engine.forward
    unchanged = forward.rope.of(length) == 0  # as for all shorter texts
    return unchanged and not forward.one_text_at_a_time and not forward.trials.looks_ahead and forward.packs(length)


def _planned_apart(engine: Engine, requests: Sequence[Request], settings: SamplingParams) -> list[Batch]:
    """Plan requests for transformers' `generate`, or for passes without a cache."""
    rope = engine.forward.rope
    has_cache = continues(engine, ALONE)
    lengths = {len(request.ids) for request in requests}
    mixed = len(lengths) > 1 and (not has_cache or continues(engine, PADDED))
    equal = mixed or len(lengths) == len(requests) or not has_cache or continues(engine, EQUAL)
    groups: dict[tuple[str, int], list[Request]] = {}
    for i, request in enumerate(requests):
        alone = (
            engine.forward.one_text_at_a_time or not equal or rope.of(len(request.ids) + settings.max_new_tokens) != 0
        )
        key = ("alone", i) if alone else ("any length", 0) if mixed else ("length", len(request.ids))
        groups.setdefault(key, []).append(request)
    planned = []
    for group in groups.values():
        longest = [len(request.ids) + settings.max_new_tokens for request in group]
        limits = engine.forward.limits
        overhead = limits.overhead * settings.max_new_tokens  # each new token is a pass
        for batch in batching.in_batches(longest, tokens=limits.cached_tokens, overhead=overhead):
            chosen = [group[i] for i in batch]
            changes = any(rope.of(len(r.ids)) != rope.of(len(r.ids) + settings.max_new_tokens) for r in chosen)
            planned.append(Batch(continued if has_cache and not changes else recomputed, chosen))
    return planned


def decoded_texts(engine: Engine, found: Sequence[tuple[int, ...]], stop: Sequence[str]) -> list[str]:
    """Return new tokens as texts, each cut before its first stop text."""
    return [stopped_text(engine.tokenizer, new, stop) for new in found]


def stops_of(engine: Engine) -> Stops:
    """Return the tokens at which a model ends its texts, and the one that pads them."""
    ends = ends_of(getattr(engine.forward.model.generation_config, "eos_token_id", None), engine.tokenizer)
    embedded = engine.forward.embedded
    for pad in (engine.tokenizer.pad_token_id, *ends):
        if pad is not None and pad < (embedded or pad + 1):  # else it has no embedding, which may end the use of a GPU
            return Stops(ends, pad)
    return Stops(ends, 0)
