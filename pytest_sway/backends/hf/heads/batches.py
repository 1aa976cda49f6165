"""Reads whole texts in batches, padded on the right and masked, where a trial shows that padding changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pytest_sway.backends.hf.scoring import batching
from pytest_sway.backends.hf.scoring.batching import in_halves
from pytest_sway.backends.hf.scoring.body_and_head import agree
from pytest_sway.backends.libraries.out_of_memory import out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_sway.backends.hf.scoring.engine import Engine
    from pytest_sway.backends.hf.scoring.scores import Run

__tracebackhide__ = True

_T = TypeVar("_T")


class Text(NamedTuple):
    """A text as a tokenizer gives it to the model.

    Attributes:
        ids: Its token ids.
        types: The type of each token, which tells a pair's texts apart; empty if the model has no types.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()


def encoded(tokenizer: Any, *texts: str, special: bool = True, **further: Any) -> Text:
    """Return a text, or a pair of texts, as the tokenizer encodes it by default.

    Args:
        tokenizer: The tokenizer.
        texts: The text, or both.
        special: Whether to add special tokens.
        further: Further arguments for the tokenizer.
    """
    fields = tokenizer(*texts, add_special_tokens=special, verbose=False, **further)
    return Text(tuple(fields["input_ids"]), tuple(fields.get("token_type_ids", ())))


def cut(tokenizer: Any, text: str, most: int) -> Text:
    """Return a text as the tokenizer encodes it with ``truncation=True, max_length=most``.

    The tokenizer would set this on its Rust object, and another thread's call might be cut, too.
    """
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        return encoded(tokenizer, text, truncation=True, max_length=most)
    encoding = rust.encode(text, add_special_tokens=False)
    encoding.truncate(max(0, most - rust.num_special_tokens_to_add(False)), direction=tokenizer.truncation_side)
    whole = rust.post_process(encoding)
    return Text(tuple(whole.ids), tuple(whole.type_ids) if "token_type_ids" in tokenizer.model_input_names else ())


def answered(
    run: Run, compute: Callable[..., Any], work: Callable[..., list[Any]], texts: Sequence[Text], *args: Any
) -> list[Any]:
    """Return an answer for each text, computed in few passes; equal texts are computed once.

    Args:
        run: The view's; see `scores`.
        compute: ``compute(engine, texts, *args)`` returns a tensor with a row for each text; it is tried once.
        work: ``work(engine, texts, *args)`` returns the answers for a batch.
        texts: The texts.
        args: What else the answers depend on.
    """
    found: dict[Text, Any] = {}
    for batch in run(_planned, list(dict.fromkeys(texts)), compute, args):
        found |= zip(batch, in_halves(run, work, batch, *args), strict=True)
    return [found[text] for text in texts]


def padded_inputs(engine: Engine, texts: Sequence[Text], pad: int) -> dict[str, Any]:
    """Return what the model takes for a batch, padded on the right."""
    device = engine.forward.model.device
    ids, mask = right_padded([text.ids for text in texts], pad, device)
    fields = {"input_ids": ids, "attention_mask": mask}
    if texts[0].types:
        of_padding = int(getattr(engine.tokenizer, "pad_token_type_id", 0))
        fields["token_type_ids"], _ = right_padded([text.types for text in texts], of_padding, device)
    return fields


def _planned(
    engine: Engine, texts: Sequence[Text], compute: Callable[..., Any], args: tuple[Any, ...]
) -> list[list[Text]]:
    forward = engine.forward
    if forward.one_text_at_a_time or not pads(engine, texts, lambda text: len(text.ids), compute, *args):
        return [[text] for text in texts]
    planned = []
    # A classifier with a decoder, such as BART's, takes only texts with equally many end tokens in a pass.
    end = forward.config.eos_token_id if getattr(forward.config, "is_encoder_decoder", False) else None
    regimes = [(forward.rope.of(len(text.ids)), bool(text.types), text.ids.count(end)) for text in texts]
    for regime in dict.fromkeys(regimes):
        some = [text for text, its in zip(texts, regimes, strict=True) if its == regime]
        lengths = [len(text.ids) for text in some]
        tokens, overhead = forward.limits.few_logits_tokens, forward.limits.overhead
        planned += [
            [some[i] for i in batch] for batch in batching.in_batches(lengths, tokens=tokens, overhead=overhead)
        ]
    return planned


def pads(
    engine: Engine, items: Sequence[_T], length: Callable[[_T], int], compute: Callable[..., Any], *args: Any
) -> bool:
    """Return whether a padded text's answer is its answer alone; tried once, on two short ones.

    It is false, for this time, if there is not enough memory to try it.

    Args:
        engine: Computes them.
        items: What is asked.
        length: Returns the tokens of an item.
        compute: ``compute(engine, items, *args)`` returns a tensor with a row for each item.
        args: What else the answers depend on.
    """
    import torch

    trials = engine.forward.trials
    shortest = sorted({length(item): item for item in items}.items(), key=lambda pair: pair[0])[:2]
    if trials.pads is None and len(shortest) == 2:
        two = [item for _, item in shortest]
        try:
            alone = torch.cat([compute(engine, [item], *args) for item in two])
            rows = zip(compute(engine, two, *args), alone, strict=True)
            trials.pads = all(agree(row, its, engine.forward.dtype) for row, its in rows)
        except Exception as error:  # an unknown architecture may raise anything; it still reads one text at a time
            if out_of_memory(error):  # which says nothing about padding: the next call tries again
                return False
            trials.pads = False
    return trials.pads is not False


def right_padded(sequences: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Return sequences padded on the right as a tensor, and the mask of what is not padding."""
    import torch

    longest = max(map(len, sequences))
    rows = [[*ids, *[pad] * (longest - len(ids))] for ids in sequences]
    mask = [[*[1] * len(ids), *[0] * (longest - len(ids))] for ids in sequences]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)
