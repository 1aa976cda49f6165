"""Sequence-to-sequence models, such as T5 and BART: an encoder reads the prompt, and a decoder scores or writes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from pytest_sway.backends.hf.generation.continuing import FiniteCheck, Request, plain_settings
from pytest_sway.backends.hf.generation.generate import decoded_texts, stops_of
from pytest_sway.backends.hf.heads import batches
from pytest_sway.backends.hf.heads.view import HeadView
from pytest_sway.backends.hf.sampling import processors, stopping
from pytest_sway.backends.hf.scoring import batching
from pytest_sway.backends.hf.scoring.answer_cache import recalling
from pytest_sway.backends.hf.scoring.batching import in_halves
from pytest_sway.backends.hf.scoring.engine import no_number
from pytest_sway.backends.text.chat import prompt_text
from pytest_sway.backends.text.requests import warn_of_cuts
from pytest_sway.backends.text.tokens import Window, encode_apart, encode_read
from pytest_sway.errors import ScoringError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from pytest_sway.backends.hf.generation.continuing import Stops
    from pytest_sway.backends.hf.scoring.engine import Engine
    from pytest_sway.backends.questions import SamplingParams
    from pytest_sway.protocols import Prompt

__tracebackhide__ = True

_BEGINNINGS: Final = ("decoder_start_token_id", "forced_bos_token_id")
"""The tokens of a model's generation settings that begin a text; those that end it are used, too, and no others."""


class Seq2SeqView(HeadView):
    """A view of a sequence-to-sequence model.

    Prompts and completions are tokenised as in lm-evaluation-harness: each by itself, the prompt with all special
    tokens and the completion without any. Pairs of similar length share a pass, padded on the right and masked.
    """

    task: ClassVar[str] = "seq2seq"

    def _logprobs(self, pairs: list[tuple[Prompt, str]]) -> list[float]:
        encoded, max_length, room = self._run(_encoded_pairs, pairs)
        windows = [_cut(window, max_length, room) for window in encoded]
        warn_of_cuts(sum(a != b for a, b in zip(windows, encoded, strict=True)), max_length)
        found: dict[Window, NDArray[np.float32]] = {}
        for batch in self._run(_planned, list(dict.fromkeys(windows))):
            found |= zip(batch, in_halves(self._run, _decoded_logprobs, batch), strict=True)
        return [float(found[window].sum()) for window in windows]

    def _continued(self, prompts: list[Prompt], settings: SamplingParams, seeds: list[int]) -> list[str]:
        encoded, max_length = self._run(_encoded_prompts, prompts, settings)
        warn_of_cuts(sum(len(ids) > max_length for ids in encoded), max_length)
        requests = [
            Request(ids[-max_length:], seed if settings.temperature > 0.0 else None)
            for ids, seed in zip(encoded, seeds, strict=True)
        ]
        stops = self._run(stops_of)
        found: dict[Request, tuple[int, ...]] = {}
        for batch in self._run(_planned_prompts, list(dict.fromkeys(requests)), settings):
            found |= zip(batch, in_halves(self._run, _written, batch, settings, stops), strict=True)
        texts: list[str] = self._run(decoded_texts, [found[request] for request in requests], settings.stop)
        return texts

    def _not_finite(self, label: str) -> str:
        logprob = self.logprob_of("hello", "hello")
        return "" if math.isfinite(logprob) else f"the {label} view gave the log-probability {logprob}"


# --- tokens -----------------------------------------------------------------------------------------------------------


def _encoded_pairs(engine: Engine, pairs: Sequence[tuple[Prompt, str]]) -> tuple[list[Window], int, int]:
    """Return the windows, and the most tokens of a prompt and of a completion."""
    windows = []
    for prompt, completion in pairs:
        text, rendered = prompt_text(engine.tokenizer, prompt)
        windows.append(encode_apart(engine.tokenizer, text, completion, rendered=rendered))
        engine.require_known(windows[-1].context + windows[-1].scored)
    return windows, engine.max_length, engine.max_length - len(_begins_of_score(engine)[1:])


def _encoded_prompts(
    engine: Engine, prompts: Sequence[Prompt], settings: SamplingParams
) -> tuple[list[tuple[int, ...]], int]:
    most = getattr(engine.forward.config, "max_position_embeddings", None)
    if most is not None and settings.max_new_tokens > most:
        raise ScoringError(
            f"max_new_tokens={settings.max_new_tokens} is more than the {most} positions of the model's decoder."
        )
    encoded = []
    for prompt in prompts:
        text, rendered = prompt_text(engine.tokenizer, prompt)
        encoded.append(encode_read(engine.tokenizer, text, rendered=rendered))
        engine.require_known(encoded[-1])
    return encoded, engine.max_length


def _cut(window: Window, max_length: int, room: int) -> Window:
    if len(window.scored) > room:
        raise ScoringError(
            f"the completion has {len(window.scored)} tokens, but the model's decoder reads at most {room} at"
            " once, by its config. Shorten it."
        )
    return Window(window.context[-max_length:], window.scored)


# --- passes -----------------------------------------------------------------------------------------------------------


def _planned(engine: Engine, windows: Sequence[Window]) -> list[list[Window]]:
    few_logits = engine.forward.limits.logits_bytes // (engine.forward.embedded or 1)  # four times that in float32
    return _in_batches(engine, windows, windows, lambda window: len(window.context) + len(window.scored), few_logits)


def _planned_prompts(engine: Engine, requests: Sequence[Request], settings: SamplingParams) -> list[list[Request]]:
    trial = [Window(request.ids, request.ids[:2]) for request in requests]
    most, new = engine.forward.limits.cached_tokens, settings.max_new_tokens
    return _in_batches(engine, requests, trial, lambda request: len(request.ids) + new, most, new)


def _in_batches(
    engine: Engine,
    items: Sequence[Any],
    trial: Sequence[Window],
    length: Callable[[Any], int],
    most: int,
    passes: int = 1,
) -> list[list[Any]]:
    """Divide items into batches.

    Args:
        engine: Computes them.
        items: What is asked.
        trial: Windows to try whether padding changes nothing.
        length: Returns the positions of an item.
        most: The most positions of a batch.
        passes: The number of passes that a batch takes.
    """
    forward = engine.forward
    if forward.one_text_at_a_time or not batches.pads(engine, trial, lambda window: len(window.context), _summed):
        return [[item] for item in items]
    tokens = max(1, min(most, forward.limits.cached_tokens if passes > 1 else forward.limits.tokens))
    made = batching.in_batches(list(map(length, items)), tokens=tokens, overhead=forward.limits.overhead * passes)
    return [[items[i] for i in batch] for batch in made]


@recalling
def _decoded_logprobs(engine: Engine, windows: Sequence[Window]) -> list[NDArray[np.float32]]:
    found = _logprobs(engine, windows).cpu().numpy()
    if np.isnan(found).any():
        raise no_number(engine)
    return [row[: len(window.scored)] for row, window in zip(found, windows, strict=True)]


def _summed(engine: Engine, windows: Sequence[Window]) -> Any:
    """Return each completion's log-probability, shape ``(windows, 1)``."""
    return _logprobs(engine, windows).sum(-1, keepdim=True)


def _logprobs(engine: Engine, windows: Sequence[Window]) -> Any:
    """Return the log-probability of each completion's tokens, and 0 where others are longer."""
    import torch

    model, pad = engine.forward.model, _pad(engine)
    ids, mask = batches.right_padded([window.context for window in windows], pad, model.device)
    labels, scored = batches.right_padded([window.scored for window in windows], pad, model.device)
    settings = engine.forward.settings  # without a cache, as with labels: with one, FSMT's decoder sees later tokens
    decoder = _decoder_inputs(engine, labels)
    logits = engine.forward.runner(input_ids=ids, attention_mask=mask, **decoder, **settings).logits
    logits = logits[:, -labels.shape[1] :]  # after virtual tokens
    logprobs: Any = torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return logprobs.masked_fill(scored == 0, 0.0)


def _decoder_inputs(engine: Engine, labels: Any) -> dict[str, Any]:
    """Return the argument with which the decoder reads completions, each after the token that begins a text.

    The model shifts them by its own rule. That of mBART, PLBart and FSMT puts the last token first, since labels end in
    a language or end token. A completion does not, so their decoder begins as `generate` does.
    """
    import torch

    shifted = getattr(engine.forward.model, "prepare_decoder_input_ids_from_labels", None)
    if shifted is None:
        return {"labels": labels}
    begins = _begins_of_score(engine)
    if not begins:
        return {"decoder_input_ids": shifted(labels=labels)}
    first = labels.new_tensor([begins] * len(labels))
    return {"decoder_input_ids": torch.cat([first, labels[:, :-1]], dim=1)}


def _begins_of_score(engine: Engine) -> list[int]:
    """Return the tokens with which the decoder begins; none where the model's own rule for labels tells them."""
    import torch

    shifted = getattr(engine.forward.model, "prepare_decoder_input_ids_from_labels", None)
    if shifted is None:
        return []
    one, two = [token for token in range(3) if token != _pad(engine)][:2]
    first = shifted(labels=torch.tensor([[one, one], [one, two]]))[:, 0].tolist()
    return list(_beginnings(engine).values()) if first == [one, two] else []


@recalling
def _written(
    engine: Engine, requests: Sequence[Request], settings: SamplingParams, stops: Stops
) -> list[tuple[int, ...]]:
    """Return the tokens that the decoder writes for each prompt, including the one that ends them."""
    ids, mask = batches.right_padded([request.ids for request in requests], _pad(engine), engine.forward.model.device)
    begins = _beginnings(engine)
    start = begins["decoder_start_token_id"]
    steps = processors(settings, [(start,)] * len(requests), [request.seed for request in requests])
    check = FiniteCheck()
    further: dict[str, Any] = {"logits_processor": [check, *steps]}
    if settings.stop:
        further["stopping_criteria"] = [stopping(engine.tokenizer, settings.stop, 1)]
    fields = {"max_new_tokens": settings.max_new_tokens, "eos_token_id": list(stops.ends) or None}
    with plain_settings(engine, **fields, **begins, pad_token_id=stops.pad) as plain:
        output = engine.model.generate(input_ids=ids, attention_mask=mask, generation_config=plain, **further)
    check.require(engine)
    found = []
    for new in output[:, 1:].tolist():
        end = next((i for i, token in enumerate(new) if token in stops.ends), len(new))
        found.append(tuple(new[: end + 1]))
    return found


def _beginnings(engine: Engine) -> dict[str, Any]:
    """Return the tokens that begin a text, from the model's generation settings, else from its config.

    Raises:
        ScoringError: Neither names the first one.
    """
    config, said = engine.forward.config, engine.forward.model.generation_config
    found = {name: getattr(said, name, None) for name in _BEGINNINGS}
    found = {name: getattr(config, name, None) if token is None else token for name, token in found.items()}
    if found["decoder_start_token_id"] is None:
        found["decoder_start_token_id"] = getattr(config, "bos_token_id", None)
    if found["decoder_start_token_id"] is None:
        raise ScoringError(
            "neither the model's generation_config.json nor its config.json names the token that begins a text"
            " (decoder_start_token_id). Write it there, as it was in training."
        )
    return {name: token for name, token in found.items() if token is not None}


def _pad(engine: Engine) -> int:
    return int(getattr(engine.forward.config, "pad_token_id", None) or 0)
