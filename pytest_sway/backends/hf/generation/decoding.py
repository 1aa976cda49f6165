"""Continues many prompts at once, each as it goes on alone.

Prompts are packed into rows without padding, and common prefixes are computed once. Then each pass computes the next
token of all texts. Nothing is computed for a text that has ended. transformers' `generate` pads prompts to the longest,
computes each common prefix again, and computes tokens for ended texts until the last one ends.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.generation.continuing import FiniteCheck, has_ended
from pytest_sway.backends.hf.generation.decode_cache import DecodeCache
from pytest_sway.backends.hf.sampling import keep_rows, processors
from pytest_sway.backends.hf.scoring import batching
from pytest_sway.backends.hf.scoring.answer_cache import recalling
from pytest_sway.backends.hf.scoring.body_and_head import joined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_sway.backends.hf.generation.continuing import Request, Stops
    from pytest_sway.backends.hf.scoring.engine import Engine
    from pytest_sway.backends.hf.scoring.forward import Forward
    from pytest_sway.backends.questions import SamplingParams

__tracebackhide__ = True

_LOGITS_BYTES: Final = 8
"""A pass over grown texts may hold this times the logits of other passes: each text has a row of them."""


def most_texts(forward: Forward) -> int:
    """Return the most texts that grow together. Many times the fixed cost of a pass, more texts would save little."""
    limits = forward.limits
    by_logits = _LOGITS_BYTES * limits.logits_bytes // (4 * (forward.embedded or 1))
    return max(1, min(by_logits, 4 * limits.overhead))


@recalling
def decoded(
    engine: Engine, requests: Sequence[Request], settings: SamplingParams, stops: Stops
) -> list[tuple[int, ...]]:
    """Return the new tokens after each prompt, including the one that ends them.

    Raises:
        MaskedError: The model cannot pack these prompts after all.
    """
    import torch

    prompts = [request.ids for request in requests]
    texts = GrowingTexts(engine.forward, prompts, settings.max_new_tokens)
    chooser = _Chooser(settings, requests, texts.logits.device)
    rows = list(range(len(requests)))  # the request of each growing text
    found: list[list[int]] = [[] for _ in requests]
    look_after = engine.forward.limits.tokens_between_looks if stops.ends or settings.stop else settings.max_new_tokens
    ends = partial(_grows_to_its_end, engine, settings, stops)
    unseen: list[Any] = []
    for count in range(1, settings.max_new_tokens + 1):
        tokens = chooser(texts.logits)
        unseen.append(tokens)
        if count == settings.max_new_tokens or len(unseen) == look_after:
            chooser.check.require(engine)
            new = torch.stack(unseen, dim=1).tolist()
            unseen.clear()
            ended = [row for row, i in enumerate(rows) if ends(found[i], new[row])]
            if count == settings.max_new_tokens or len(ended) == len(rows):
                break
            if ended:
                kept = texts.drop(ended)
                chooser.keep(kept)
                rows = [rows[row] for row in kept]
                tokens = tokens[kept]
        texts.grow(tokens)
    return [tuple(new) for new in found]


def _grows_to_its_end(
    engine: Engine, settings: SamplingParams, stops: Stops, text: list[int], new: Sequence[int]
) -> bool:
    """Add new tokens to a text up to the one that ends it, and return whether one does."""
    for token in new:
        text.append(token)
        if has_ended(engine, text, settings, stops):
            return True
    return False


class _Chooser:
    """Chooses the next token of each growing text.

    Args:
        settings: How.
        requests: The texts' prompts and seeds.
        device: The logits' device.

    Attributes:
        check: Notices NaN.
    """

    def __init__(self, settings: SamplingParams, requests: Sequence[Request], device: Any) -> None:
        import torch

        self.check = FiniteCheck()
        prompts = [request.ids for request in requests]
        self._steps = processors(settings, prompts, [request.seed for request in requests])
        self._count = max(map(len, prompts))
        if self._steps:  # which may count tokens
            most = self._count + settings.max_new_tokens
            self._ids = torch.zeros(len(prompts), most, dtype=torch.long, device=device)

    def __call__(self, logits: Any) -> Any:
        if not self._steps:
            highest, tokens = logits.max(-1)
            self.check.see(highest)
            return tokens
        scores = self.check(None, logits)
        for step in self._steps:
            scores = step(self._ids[:, : self._count], scores)
        tokens = scores.argmax(-1)
        self._ids[:, self._count] = tokens
        self._count += 1
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these texts, in this order."""
        keep_rows(self._steps, rows)
        if self._steps:
            self._ids = self._ids[list(rows)]


class GrowingTexts:
    """Prompts of a model that packs texts, which grow by a token of each in one pass.

    Args:
        forward: The model's forward passes.
        prompts: The token ids of each.
        room: The most new tokens of each.

    Attributes:
        logits: The float32 logits of each text's next token, shape ``(texts, vocabulary)``.
    """

    def __init__(self, forward: Forward, prompts: Sequence[Sequence[int]], room: int) -> None:
        self._forward = forward
        self._cache = DecodeCache(prompts, room, forward.model.device, forward.limits.attention_columns)
        families = forward.families(prompts)
        tokens, overhead = forward.tokens(few_logits=True), forward.limits.overhead
        lengths = [family.positions for family in families]
        last: list[Any] = [None] * len(prompts)
        for batch in batching.in_batches(lengths, tokens=tokens, overhead=overhead, padded=False):
            members = [i for f in batch for i in families[f].members]
            groups, start = [], 0
            for f in batch:
                size = len(families[f].members)
                groups.append(families[f]._replace(members=range(start, start + size)))
                start += size
            row = self._cache.prefilled(members, [prompts[i] for i in members], groups)
            states = forward.states(row)
            for i, runs in zip(members, row.places, strict=True):
                end = next(run[-1] for run in reversed(runs) if run)
                last[i] = states[end : end + 1].clone()  # the others are freed
        self.logits = self._logits(joined(last))

    def grow(self, tokens: Any) -> None:
        """Add a token to each text.

        Args:
            tokens: The tokens' ids, shape ``(texts,)``.
        """
        self.logits = self._logits(self._forward.states(self._cache.step(tokens)))

    def drop(self, texts: Sequence[int]) -> list[int]:
        """Drop texts. Return the others, in their new order, by their number in the old one."""
        kept = list(range(len(self._cache.lengths)))
        for text in sorted(texts, reverse=True):
            self._cache.drop(text)
            kept[text] = kept[-1]
            kept.pop()
        return kept

    def _logits(self, states: Any) -> Any:
        return self._forward.next_logits(states).float()
