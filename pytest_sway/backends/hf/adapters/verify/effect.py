"""Verifies that an adapter changes what its base computes. Weights cannot always show it, so the models are run."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.peft_adapter import CONFIG, ROOT, WEIGHTS, public_name
from pytest_sway.backends.hf.adapters.peft_errors import AdapterFaultError
from pytest_sway.backends.hf.adapters.resized_embeddings import trained_words
from pytest_sway.backends.hf.adapters.verify.weights import NOT_TRAINED
from pytest_sway.backends.hf.hygiene.finite import has_nan
from pytest_sway.backends.hf.loading.classes import text_parts
from pytest_sway.backends.hf.loading.model import is_quantized
from pytest_sway.backends.hf.loading.tasks import numbers
from pytest_sway.backends.hf.model.skeletons import inner_model
from pytest_sway.backends.libraries.process import no_warnings
from pytest_sway.errors import SwayWarning
from pytest_sway.spec.tasks import is_causal
from pytest_sway.system.wording import some

if TYPE_CHECKING:
    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.hf.model.bound_model import BoundModel
    from pytest_sway.backends.hf.scoring.engine import Engine

__tracebackhide__ = True

_TOKENS: Final = 16
_ROWS: Final = 4096
_ROUNDING: Final = 2.0**-17
"""The rounding error of float32 logits, relative to the largest. Untrained PiSSA, OLoRA, HRA, DEFT, OSF and FRoD
compute their zero as a difference of large numbers, and reach at most 1.4e-6 on SmolLM2-135M and on tiny models. One
step of training at a rate of 1e-5 reaches at least 2.7e-5."""


def verify_effect(base: LoadedBase, tuned: BoundModel, files: AdapterFiles) -> None:
    """Raise unless an adapter changes its base's logits, for tokens from all over the vocabulary.

    If its weights show that it changes anything, it is not run. An adapter on parts of a multimodal model that take no
    text can change what the model computes for images, so it is not refused: a warning says that it is none for text.

    If their vocabularies differ in size, the tokens that both have are compared. An adapter that trains single
    tokens beyond those is not checked.

    In half precision, only equal logits count as the same: rounding is as large there as the effect of little training.

    Args:
        base: The base.
        tuned: The base with the adapter.
        files: The adapter's files, with its tensors' names in the base.

    Raises:
        AdapterFaultError: The logits are the same, or the adapter turns them into NaN.
    """
    import torch

    beside = _beside_text(base.pristine.model, files)
    quantized = is_quantized(base.spec)
    reads_base = quantized and files.config.get("use_dora")  # not every quantized layer can be read in each pass
    if files.told_by_weights and not beside and not reads_base:
        return
    with no_warnings(), torch.inference_mode(), base.side.engine() as plain, tuned.engine() as changed:
        words = min(_vocabulary(plain), _vocabulary(changed))
        if max(trained_words(files), default=0) >= words:
            return
        ids = _probe(words, files)
        computed = _logits if is_causal(base.spec.task) else _numbers
        before, after = computed(plain, ids), computed(changed, ids)
        if quantized:
            computed(changed, ids)  # PEFT's DoRA on LLM.int8 fails in each second pass
        if _vocabulary(plain) != _vocabulary(changed):
            before, after = before[..., :words], after[..., :words]
        if has_nan(after) and not has_nan(before):
            raise AdapterFaultError(
                f"the adapter {str(files.folder)!r} makes the base {base.spec.base!r} compute NaN for {len(ids)} tokens"
                f" from all over the vocabulary; the fault is in its {WEIGHTS} or its {CONFIG}",
                "Its training diverged, or its config is not the one that it was trained with.",
                partial(_require_another, ids, before[-1]),
            )
        same = before.shape == after.shape and _same(before, after) and not _embeddings_differ(plain, changed, words)
        if same and not beside:
            raise AdapterFaultError(
                f"the adapter {str(files.folder)!r} changes nothing on the base {base.spec.base!r}: for {len(ids)}"
                " tokens from all over the vocabulary the logits stay the same",
                NOT_TRAINED,
                partial(_require_another, ids, before[-1]),
            )
    if same:
        warnings.warn(
            f"the adapter {str(files.folder)!r} changes nothing on the base {base.spec.base!r} for text, and views ask"
            f" for text alone: all its tensors are on other parts of the model ({some(beside)}). Name an adapter that"
            " was trained on the text model, or pass images to view.model yourself.",
            SwayWarning,
            stacklevel=3,
        )


def _beside_text(model: Any, files: AdapterFiles) -> list[str]:
    """Return the names of an adapter's tensors in a multimodal model if none is in its text model; else nothing."""
    parts = text_parts(model)
    names = [name.removeprefix(ROOT) for name in files.entries or () if name.startswith(ROOT)]
    return [] if not parts or any(name.startswith(parts) for name in names) else list(map(public_name, names))


def _require_another(ids: list[int], before: Any, model: Any) -> None:
    """Raise if a model's logits after the given tokens are NaN, or as before."""
    after = numbers(inner_model(model), ids, model)[-1, : before.shape[-1]]
    if has_nan(after) or _same(before, after.to(before.device)):
        raise ValueError("the logits are NaN or unchanged")


def _vocabulary(engine: Engine) -> int:
    return int(engine.forward.model.get_input_embeddings().weight.shape[0])


def _probe(words: int, files: AdapterFiles) -> list[int]:
    """Return tokens from all over the vocabulary, after the tokens that activate an aLoRA adapter."""
    return [*(files.config.get("alora_invocation_tokens") or ()), *range(0, words, max(1, words // _TOKENS))]


def _logits(engine: Engine, ids: list[int]) -> Any:
    import torch

    return torch.stack(engine.forward.logits([(ids, len(ids))], lambda parts, *_: next(iter(parts))))


def _numbers(engine: Engine, ids: list[int]) -> Any:
    return numbers(engine.forward.model, ids, engine.forward.runner)


def _same(plain: Any, changed: Any) -> bool:
    import torch

    if plain.dtype != torch.float32 or changed.dtype != torch.float32:
        return bool(plain.equal(changed))
    return bool((plain - changed).abs().max() <= plain.abs().max() * _ROUNDING)


def _embeddings_differ(base: Engine, tuned: Engine, words: int) -> bool:
    """Return whether any of the first ``words`` tokens has another embedding; the probe has only a few of them."""
    import torch

    embed, embed_tuned = base.forward.model.get_input_embeddings(), tuned.forward.model.get_input_embeddings()
    for start in range(0, words, _ROWS):
        ids = torch.arange(start, min(start + _ROWS, words), device=embed.weight.device)
        if not embed(ids).equal(embed_tuned(ids)):
            return True
    return False
