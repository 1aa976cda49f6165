"""Continues prompts with transformers' own `generate`, or without a cache; one of the two works for any model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_sway.backends.hf.sampling import processors, stopping
from pytest_sway.backends.hf.scoring.answer_cache import recalling
from pytest_sway.backends.hf.scoring.engine import Engine, no_number
from pytest_sway.backends.hf.scoring.scores import next_logits
from pytest_sway.backends.text.stopping import has_stopped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_sway.backends.questions import SamplingParams

__tracebackhide__ = True


class Stops(NamedTuple):
    """The tokens that end a text, and the token that pads shorter texts of a batch."""

    ends: tuple[int, ...]
    pad: int


class Request(NamedTuple):
    """A prompt's token ids, and the seed of its sampling; ``None`` for greedy decoding."""

    ids: tuple[int, ...]
    seed: int | None


@recalling
def continued(
    engine: Engine, requests: Sequence[Request], settings: SamplingParams, stops: Stops
) -> list[tuple[int, ...]]:
    """Return the new tokens after each prompt, including the one that ends them, by transformers' `generate`."""
    prompts = [request.ids for request in requests]
    arguments = left_padded(engine, prompts, stops.pad)
    width = arguments["input_ids"].shape[1]
    seeds = [request.seed for request in requests]
    check = FiniteCheck()
    arguments["logits_processor"] = [check, *processors(settings, prompts, seeds)]
    if settings.stop:
        arguments["stopping_criteria"] = [stopping(engine.tokenizer, settings.stop, width)]
    forward, length = engine.forward, max(len(request.ids) for request in requests) + settings.max_new_tokens
    forward.spent = forward.spent or forward.rope.leaves_a_trace(length)
    ends = list(stops.ends) or None
    fields = {"max_new_tokens": settings.max_new_tokens, "eos_token_id": ends, "pad_token_id": stops.pad}
    with plain_settings(engine, **fields) as plain:
        output = engine.model.generate(generation_config=plain, **arguments)
    check.require(engine)
    found = []
    for new in output[:, width:].tolist():
        end = next((i for i, token in enumerate(new) if token in stops.ends), len(new))
        found.append(tuple(new[: end + 1]))
    return found


@recalling
def recomputed(
    engine: Engine, requests: Sequence[Request], settings: SamplingParams, stops: Stops
) -> list[tuple[int, ...]]:
    """Do the same without a cache: each new token takes a pass over all of the text before it."""
    import torch

    check = FiniteCheck()
    steps = [processors(settings, [request.ids], [request.seed]) for request in requests]
    found: list[tuple[int, ...]] = [()] * len(requests)
    for _ in range(settings.max_new_tokens):
        texts: dict[tuple[int, ...], list[int]] = {}
        for i, (request, new) in enumerate(zip(requests, found, strict=True)):
            if not (new and has_ended(engine, new, settings, stops)):
                texts.setdefault(request.ids + new, []).append(i)
        for text, logits in next_logits(engine, list(texts)):
            check(None, logits.unsqueeze(0))
            for i in texts[text]:
                scores = logits.unsqueeze(0)
                for step in steps[i]:
                    scores = step(torch.tensor([text], device=scores.device), scores)
                found[i] += (int(scores[0].argmax()),)
        check.require(engine)
    return found


def has_ended(engine: Engine, new: Sequence[int], settings: SamplingParams, stops: Stops) -> bool:
    """Return whether the last of a text's new tokens ends it; to be asked after each token."""
    return new[-1] in stops.ends or bool(settings.stop and has_stopped(engine.tokenizer, new, settings.stop))


def left_padded(engine: Engine, prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Return prompts as arguments of a model, padded on the left."""
    import torch

    missing = [max(map(len, prompts)) - len(ids) for ids in prompts]
    rows = [[*[pad] * n, *ids] for n, ids in zip(missing, prompts, strict=True)]
    mask = [[*[0] * n, *[1] * len(ids)] for n, ids in zip(missing, prompts, strict=True)]
    device = engine.model.device
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}


class FiniteCheck:
    """A logits processor that notices NaN, without waiting for the device; argmax would return a token all the same."""

    def __init__(self) -> None:
        self._finite: Any = None

    def __deepcopy__(self, _memo: Any) -> FiniteCheck:
        """Return itself: PEFT copies the arguments of `generate` for adapters of prompts, and would check the copy."""
        return self

    def __call__(self, _ids: Any, scores: Any) -> Any:
        """Return the scores as they are."""
        self.see(scores.amax(-1))
        return scores

    def see(self, highest: Any) -> None:
        """Notice NaN among the highest logits of some rows; NaN counts as highest."""
        finite = highest.isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite

    def require(self, engine: Engine) -> None:
        """Raise `ScoringError` if there was NaN."""
        if self._finite is not None and not self._finite:
            raise no_number(engine)


@contextmanager
def plain_settings(engine: Engine, **fields: Any) -> Iterator[Any]:
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
