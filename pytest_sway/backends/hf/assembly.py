"""Making a backend of what was loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_sway.backends.hf.adapters import put_on, take_off
from pytest_sway.backends.hf.backend import HFBackend, Loaded
from pytest_sway.backends.hf.base import load_base, resize_vocabulary
from pytest_sway.backends.hf.effect import verify_effect
from pytest_sway.backends.hf.finetuned import verify_finetuned
from pytest_sway.backends.hf.inspection import AdapterRecord
from pytest_sway.backends.hf.sides import base_side, plain_side, tuned_side
from pytest_sway.backends.hf.tokenizers import adapter_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.base import LoadedBase
    from pytest_sway.backends.shared import Share
    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


def load_own_base(spec: ModelSpec, files: AdapterFiles, load_base: Callable[..., LoadedBase] = load_base) -> LoadedBase:
    """Load a base for one adapter alone, with as many words as the adapter has embeddings for."""
    base = load_base(spec, shared=False)
    rows = files.vocabulary
    if rows is not None:
        resize_vocabulary(base, rows)
    if files.one_text_at_a_time:
        base.forward.limits = replace(base.forward.limits, tokens=1, few_logits_tokens=1)
    return base


def assemble(
    spec: ModelSpec,
    files: AdapterFiles | None,
    shares: list[Share[LoadedBase]],
    withdraw: Callable[[LoadedBase], None],
) -> HFBackend:
    """Put the adapter on, or look at the fine-tuned model, verify it, and make the backend.

    Args:
        spec: The resolved spec.
        files: Its adapter, if it has one.
        shares: The bases: the shared one, the adapter's own one, or both in this order; or the base and the fine-tuned
            model.
        withdraw: What a backend calls with a base that was changed.

    Raises:
        AdapterMismatchError: The adapter, or the fine-tuned model, does not fit, or does nothing.
    """
    first, last = shares[0].value, shares[-1].value
    if files is not None:
        return HFBackend(spec, _with_adapter(files, list(shares)), withdraw)
    tuned = None
    if first is not last:
        verify_finetuned(first, last)
        tuned = plain_side(last)
    return HFBackend(spec, Loaded(list(shares), plain_side(first), tuned), withdraw)


def _with_adapter(files: AdapterFiles, shares: list[Share[LoadedBase]]) -> Loaded:
    first, last = shares[0].value, shares[-1].value
    tokenizer, tokenizer_record = adapter_tokenizer(last, files)
    adapter = put_on(last, files)
    base = base_side(first, adapter, tokenizer) if first is last else plain_side(first, tokenizer)
    tuned = tuned_side(last, adapter, tokenizer)
    if not files.told_by_weights:
        try:
            verify_effect(base, tuned, adapter)
        except BaseException:
            take_off(last, adapter)
            raise
    return Loaded(shares, base, tuned, adapter, AdapterRecord(adapter), tokenizer_record)
