"""Making a backend of what was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_sway.backends.hf.adapters import put_on
from pytest_sway.backends.hf.backend import HFBackend, Loaded
from pytest_sway.backends.hf.base import load_base, resize_vocabulary
from pytest_sway.backends.hf.inspection import AdapterRecord
from pytest_sway.backends.hf.sides import base_side, tuned_side
from pytest_sway.backends.hf.tokenizers import adapter_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.base import LoadedBase
    from pytest_sway.backends.shared import Share
    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


def load_own_base(spec: ModelSpec, files: AdapterFiles) -> LoadedBase:
    """Load a base for one adapter alone, with as many words as the adapter has embeddings for."""
    base = load_base(spec, shared=False)
    rows = files.vocabulary
    if rows is not None:
        resize_vocabulary(base, rows)
    return base


def assemble(
    spec: ModelSpec,
    files: AdapterFiles | None,
    shares: list[Share[LoadedBase]],
    withdraw: Callable[[LoadedBase], None],
) -> HFBackend:
    """Put the adapter on, verify it, and make the backend.

    Args:
        spec: The resolved spec.
        files: Its adapter, if it has one.
        shares: The bases: the shared one, the adapter's own one, or both in this order.
        withdraw: What a backend calls with a base that was changed.

    Raises:
        AdapterMismatchError: The adapter does not fit, or does nothing.
    """
    first, last = shares[0].value, shares[-1].value
    if files is None:
        tokenizer, record = first.tokenizer, first.tokenizer_record
        return HFBackend(
            spec, Loaded(list(shares), None, None, tokenizer, record, base_side(first, None), None), withdraw
        )
    tokenizer, record = adapter_tokenizer(last, files)
    adapter = put_on(last, files)
    adapter_record = AdapterRecord(adapter)
    base = base_side(first, adapter if first is last else None)
    loaded = Loaded(list(shares), adapter, adapter_record, tokenizer, record, base, tuned_side(last, adapter))
    return HFBackend(spec, loaded, withdraw)
