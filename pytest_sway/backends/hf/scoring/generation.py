"""Generates text, greedy or sampled. Only the end tokens come from the base's generation settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_sway.backends.hf.sampling import processors, stopping
from pytest_sway.backends.hf.scoring import batching
from pytest_sway.backends.hf.scoring.answer_cache import recalling
from pytest_sway.backends.hf.scoring.body_and_head import agree, trial_tokens
from pytest_sway.backends.hf.scoring.engine import Engine, no_number
from pytest_sway.backends.hf.scoring.memory_retry import in_halves
from pytest_sway.backends.hf.scoring.scores import next_logits
from pytest_sway.backends.text.requests import encoded_prompts, warn_of_cuts
from pytest_sway.backends.text.stopping import has_stopped, stopped_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.backends.hf.scoring.scores import Run
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Prompt

__tracebackhide__ = True

_PADDED: Final = (2, 7)
_EQUAL: Final = (3, 3)
_ALONE: Final = (3,)
"""Lengths of the prompts in a trial."""

_STEPS: Final = 3
"""Tokens that a trial generates: a faulty state or cache shows from the second or third one on."""


class Stops(NamedTuple):
    """The tokens that end a text, and the token that pads shorter texts of a batch."""

    ends: tuple[int, ...]
    pad: int


class Request(NamedTuple):
    """A prompt's token ids, and the seed of its sampling; ``None`` for greedy decoding."""

    ids: tuple[int, ...]
    seed: int | None


def generate_many(run: Run, prompts: Sequence[Prompt], settings: SamplingParams, seeds: Sequence[int]) -> list[str]:
    """Return the continuation of each prompt from its seed, in the prompts' order."""
    encoded, max_length = run(encoded_prompts, prompts)
    room = settings.room(max_length)
    warn_of_cuts(sum(len(ids) > room for ids in encoded), room)
    requests = [
        Request(ids[-room:], seed if settings.temperature > 0.0 else None)
        for ids, seed in zip(encoded, seeds, strict=True)
    ]
    stops: Stops = run(_stops)
    found: dict[Request, tuple[int, ...]] = {}
    for batch in run(_planned, list(dict.fromkeys(requests)), settings):
        found |= zip(batch, in_halves(run, _continued, batch, settings, stops), strict=True)
    texts: list[str] = run(_decoded, [found[request] for request in requests], settings.stop)
    return texts


def _planned(engine: Engine, requests: Sequence[Request], settings: SamplingParams) -> list[list[Request]]:
    rope = engine.forward.rope
    recomputed = not _continues(engine, _ALONE)
    lengths = {len(request.ids) for request in requests}
    mixed = len(lengths) > 1 and (recomputed or _continues(engine, _PADDED))
    equal = mixed or len(lengths) == len(requests) or recomputed or _continues(engine, _EQUAL)
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
            planned.append([group[i] for i in batch])
    return planned


@recalling
def _continued(
    engine: Engine, requests: Sequence[Request], settings: SamplingParams, stops: Stops
) -> list[tuple[int, ...]]:
    """Return the new tokens after each prompt, including the one that ends them."""
    if not _continues(engine, _ALONE) or _changes_rope(engine, requests, settings):
        return _recomputed(engine, requests, settings, stops)
    prompts = [request.ids for request in requests]
    arguments = _left_padded(engine, prompts, stops.pad)
    width = arguments["input_ids"].shape[1]
    seeds = [request.seed for request in requests]
    arguments["logits_processor"] = [_checked(engine), *processors(settings, prompts, seeds)]
    if settings.stop:
        arguments["stopping_criteria"] = [stopping(engine.tokenizer, settings.stop, width)]
    forward, length = engine.forward, max(len(request.ids) for request in requests) + settings.max_new_tokens
    forward.spent = forward.spent or forward.rope.leaves_a_trace(length)
    ends = list(stops.ends) or None
    fields = {"max_new_tokens": settings.max_new_tokens, "eos_token_id": ends, "pad_token_id": stops.pad}
    with _plain_settings(engine, **fields) as plain:
        output = engine.model.generate(generation_config=plain, **arguments)
    found = []
    for new in output[:, width:].tolist():
        end = next((i for i, token in enumerate(new) if token in stops.ends), len(new))
        found.append(tuple(new[: end + 1]))
    return found


def _changes_rope(engine: Engine, requests: Sequence[Request], settings: SamplingParams) -> bool:
    """Return whether a text grows past a length where rotary embeddings change, so that its cache becomes invalid."""
    rope = engine.forward.rope
    return any(rope.of(len(r.ids)) != rope.of(len(r.ids) + settings.max_new_tokens) for r in requests)


def _recomputed(
    engine: Engine, requests: Sequence[Request], settings: SamplingParams, stops: Stops
) -> list[tuple[int, ...]]:
    """Do the same without a cache: each new token takes a pass over all of the text before it."""
    import torch

    check = _checked(engine)
    steps = [processors(settings, [request.ids], [request.seed]) for request in requests]
    found: list[tuple[int, ...]] = [()] * len(requests)
    for _ in range(settings.max_new_tokens):
        texts: dict[tuple[int, ...], list[int]] = {}
        for i, (request, new) in enumerate(zip(requests, found, strict=True)):
            if not (new and _has_ended(engine, new, settings, stops)):
                texts.setdefault(request.ids + new, []).append(i)
        for text, logits in next_logits(engine, list(texts)):
            check(None, logits)
            for i in texts[text]:
                scores = logits.unsqueeze(0)
                for step in steps[i]:
                    scores = step(torch.tensor([text], device=scores.device), scores)
                found[i] += (int(scores[0].argmax()),)
    return found


def _has_ended(engine: Engine, new: tuple[int, ...], settings: SamplingParams, stops: Stops) -> bool:
    return new[-1] in stops.ends or bool(settings.stop and has_stopped(engine.tokenizer, new, settings.stop))


def _decoded(engine: Engine, found: Sequence[tuple[int, ...]], stop: Sequence[str]) -> list[str]:
    return [stopped_text(engine.tokenizer, new, stop) for new in found]


def _left_padded(engine: Engine, prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    import torch

    missing = [max(map(len, prompts)) - len(ids) for ids in prompts]
    rows = [[*[pad] * n, *ids] for n, ids in zip(missing, prompts, strict=True)]
    mask = [[*[0] * n, *[1] * len(ids)] for n, ids in zip(missing, prompts, strict=True)]
    device = engine.model.device
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _checked(engine: Engine) -> Any:
    """Return a logits processor that raises for NaN; argmax would return a token all the same."""

    def check(_ids: Any, scores: Any) -> Any:
        if not scores.amax(-1).isfinite().all():
            raise no_number(engine)
        return scores

    return check


@contextmanager
def _plain_settings(engine: Engine, **fields: Any) -> Iterator[Any]:
    """Replace the model's generation settings for one call: they would fill in whatever it leaves open."""
    import transformers

    config_class: Any = transformers.GenerationConfig
    plain = config_class(**fields, do_sample=False, use_cache=True)
    owner = engine.forward.model
    before, owner.generation_config = owner.generation_config, plain
    try:
        yield plain
    finally:
        owner.generation_config = before


def _stops(engine: Engine) -> Stops:
    ends = _ends(engine)
    pad = next((token for token in (engine.tokenizer.pad_token_id, *ends) if token is not None), 0)
    return Stops(tuple(ends), pad)


def _ends(engine: Engine) -> list[int]:
    """Return the tokens that end a text: from the base's generation settings, else the tokenizer's EOS."""
    configured = getattr(engine.forward.model.generation_config, "eos_token_id", None)
    ends = engine.tokenizer.eos_token_id if configured is None else configured
    if ends is None:
        return []
    return [int(end) for end in (ends if isinstance(ends, Iterable) else [ends])]


def _continues(engine: Engine, lengths: tuple[int, ...]) -> bool:
    """Return whether prompts of these lengths continue from a cache as the model scores them; tried once.

    This fails if a recurrent state takes in padding or is made for one text at a time; if virtual tokens come before
    the padding; or if later tokens change what a token computes.
    """
    trials = engine.forward.trials
    known = trials.continues
    if trials.looks_ahead:
        return False
    if lengths not in known:
        tokens = trial_tokens(engine.forward.model) * 2
        prompts = [tokens[i : i + length] for i, length in enumerate(lengths)]
        try:
            known[lengths] = _as_scored(engine, prompts)
        except Exception as error:  # a model without a cache, or with one of its own kind, can fail in any way
            trials.failed(error)
            known[lengths] = False
    return known[lengths]


def _as_scored(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> bool:
    import torch

    fields = {"max_new_tokens": _STEPS, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    arguments = _left_padded(engine, prompts, 0)
    with _plain_settings(engine, **fields) as plain:
        output = engine.model.generate(generation_config=plain, **arguments)
    made = output.sequences[:, arguments["input_ids"].shape[1] :].tolist()
    texts = [[prompt + tuple(new[:step]) for prompt, new in zip(prompts, made, strict=True)] for step in range(_STEPS)]
    scored = dict(next_logits(engine, list(dict.fromkeys(text for step in texts for text in step))))
    return all(
        agree(logits, torch.stack([scored[text] for text in step]))
        for logits, step in zip(output.logits, texts, strict=True)
    )
