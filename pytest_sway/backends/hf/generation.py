"""New text: greedy or sampled, for one prompt or many, and nothing of it from the base's generation settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_sway.backends.hf import batches
from pytest_sway.backends.hf.halving import in_parts
from pytest_sway.backends.hf.recall import recalling
from pytest_sway.backends.hf.scores import Engine, encoded_prompts, warn_of_cuts
from pytest_sway.backends.hf.split import agree
from pytest_sway.backends.questions import Settings, listed, seeds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.backends.hf.scores import Run
    from pytest_sway.scoring import Prompt

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_TRIAL = ((1, 2), (0, 1, 2))


class Stops(NamedTuple):
    """The tokens that end a text, and the one that fills up shorter texts of a batch."""

    ends: tuple[int, ...]
    pad: int


class Request(NamedTuple):
    """A prompt's token ids, and where its sampling starts; greedy requests have no seed."""

    ids: tuple[int, ...]
    seed: int | None


def generate_many(run: Run, prompts: Iterable[Prompt], settings: Settings, seed: int | Sequence[int]) -> list[str]:
    """Continue each prompt; see `HFView.generate_many`."""
    settings.check()
    encoded, max_length = run(encoded_prompts, listed(prompts, "prompts"))
    room = settings.room(max_length)
    warn_of_cuts(sum(len(ids) > room for ids in encoded), room)
    requests = [
        Request(ids[-room:], one if settings.temperature > 0.0 else None)
        for ids, one in zip(encoded, seeds(seed, len(encoded)), strict=True)
    ]
    stops: Stops = run(_stops)
    found: dict[Request, tuple[int, ...]] = {}
    for batch in run(_planned, list(dict.fromkeys(requests)), settings):
        found |= zip(batch, in_parts(run, _continued, batch, settings, stops), strict=True)
    texts: list[str] = run(_decoded, [found[request] for request in requests])
    return texts


def _planned(engine: Engine, requests: Sequence[Request], settings: Settings) -> list[list[Request]]:
    rope = engine.forward.rope
    groups: dict[Any, list[Request]] = {}
    for request in requests:
        regime = rope.of(len(request.ids) + settings.max_new_tokens)
        alone = None if regime == 0 else request
        groups.setdefault((len(request.ids), alone), []).append(request)
    if len(groups) > 1 and _pads_left(engine):
        short = [request for (_, alone), group in groups.items() if alone is None for request in group]
        groups = {key: group for key, group in groups.items() if key[1] is not None} | ({0: short} if short else {})
    planned = []
    for group in groups.values():
        lengths = [len(request.ids) + settings.max_new_tokens for request in group]
        limits = engine.forward.limits
        overhead = limits.overhead * settings.max_new_tokens  # each new token is a pass
        for batch in batches.in_batches(lengths, tokens=limits.cached_tokens, overhead=overhead):
            planned.append([group[i] for i in batch])
    return planned


@recalling
def _continued(engine: Engine, requests: Sequence[Request], settings: Settings, stops: Stops) -> list[tuple[int, ...]]:
    """The new tokens after each prompt, with the one that ends them."""
    arguments = _left_padded(engine, [request.ids for request in requests], stops.pad)
    if settings.temperature > 0.0:
        arguments["logits_processor"] = _sampling(settings, [request.seed for request in requests])
    forward, length = engine.forward, max(len(request.ids) for request in requests) + settings.max_new_tokens
    forward.spent = forward.spent or forward.rope.leaves_a_trace(length)
    ends = list(stops.ends) or None
    fields = {"max_new_tokens": settings.max_new_tokens, "eos_token_id": ends, "pad_token_id": stops.pad}
    with _plain_settings(engine, **fields) as plain:
        output = engine.model.generate(generation_config=plain, **arguments)
    found = []
    for new in output[:, arguments["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(new) if token in stops.ends), len(new))
        found.append(tuple(new[: end + 1]))
    return found


def _decoded(engine: Engine, found: Sequence[tuple[int, ...]]) -> list[str]:
    return [str(engine.tokenizer.decode(list(new), skip_special_tokens=True)) for new in found]


def _left_padded(engine: Engine, prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    import torch

    missing = [max(map(len, prompts)) - len(ids) for ids in prompts]
    rows = [[*[pad] * n, *ids] for n, ids in zip(missing, prompts, strict=True)]
    mask = [[*[0] * n, *[1] * len(ids)] for n, ids in zip(missing, prompts, strict=True)]
    device = engine.model.device
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _sampling(settings: Settings, seeds: Sequence[int | None]) -> Any:
    """Turn greedy decoding into sampling, row by row.

    The token whose logit plus Gumbel noise is the highest is a sample from the softmax. The noise of a row comes from a
    generator of its own, on the CPU: so a row is sampled alike alone and in a batch, on any device, and the random
    state of the process takes no part.
    """
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    generators = [torch.Generator(device="cpu").manual_seed(int(seed or 0)) for seed in seeds]

    def add_noise(_ids: Any, scores: Any) -> Any:
        noise = [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in generators]
        return scores - torch.stack(noise).log_().to(scores.device)

    steps: list[Any] = [TemperatureLogitsWarper(float(settings.temperature))]
    if settings.top_p < 1.0:
        steps.append(TopPLogitsWarper(settings.top_p))
    return LogitsProcessorList([*steps, add_noise])


@contextmanager
def _plain_settings(engine: Engine, **fields: Any) -> Iterator[Any]:
    """Have the model forget its generation settings meanwhile: they fill in whatever a call leaves open."""
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
    """Return the tokens that end a text: what the base's generation settings say, else the tokenizer's EOS."""
    configured = getattr(engine.forward.model.generation_config, "eos_token_id", None)
    ends = engine.tokenizer.eos_token_id if configured is None else configured
    if ends is None:
        return []
    return [int(end) for end in (ends if isinstance(ends, Iterable) else [ends])]


def _pads_left(engine: Engine) -> bool:
    """Whether a prompt padded on the left goes on as it does alone; tried once, on a few tokens.

    Not so where a model has a recurrent state that knows no mask, or virtual tokens stand in front of the padding.
    """
    forward = engine.forward
    if engine.model is not forward.model:
        return False
    trials = forward.trials
    if trials.pads_left is None:
        short, long = _TRIAL
        alone = _first_logits(engine, [short])
        try:
            padded = _first_logits(engine, [short, long])
        except Exception:  # a model that takes no mask can fail in any way
            trials.pads_left = False
        else:
            trials.pads_left = agree(padded[:1], alone)
    return trials.pads_left


def _first_logits(engine: Engine, prompts: Sequence[Sequence[int]]) -> Any:
    fields = {"max_new_tokens": 1, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    with _plain_settings(engine, **fields) as plain:
        return engine.model.generate(generation_config=plain, **_left_padded(engine, prompts, 0)).logits[0]
