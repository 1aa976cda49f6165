"""Merges adapters into a base, in order, so that another adapter can be put on the result."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.checkpoints.peft_adapter import OF_BASE, ROOT, not_merged
from pytest_sway.backends.hf.adapters.attach import attach, explained
from pytest_sway.backends.hf.adapters.verify.effect import verify_effect
from pytest_sway.backends.hf.hygiene.memory import collect
from pytest_sway.backends.hf.loading.libraries import quiet_process
from pytest_sway.backends.hf.model.base import MergedBase
from pytest_sway.backends.hf.model.pristine import Pristine
from pytest_sway.backends.hf.model.tokenizers import adapter_tokenizer
from pytest_sway.backends.hf.sharing.tensor_memory import own_before_write
from pytest_sway.backends.hf.sharing.trees import modules_of, tensors_of
from pytest_sway.backends.libraries.culprits import said
from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.errors import SpecError, SwayError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.hf.model.bound_model import Adapter

__tracebackhide__ = True


def merge(base: LoadedBase, adapters: Sequence[AdapterFiles]) -> MergedBase:
    """Return a base with adapters merged into it by PEFT, in order. Each is verified first.

    The result shares all memory with the base that the adapters leave as it is.

    Raises:
        AdapterMismatchError: An adapter does not fit what it is put on, is not finite, or has no effect.
        SpecError: PEFT cannot merge an adapter.
    """
    below = base
    for number, files in enumerate(adapters, start=1):
        merged = _merged(base, below, files, number)
        if isinstance(below, MergedBase) and merged.pristine.shares:
            below.close()
            collect(base.device.type)
        below = merged
    assert isinstance(below, MergedBase)
    return below


def _merged(base: LoadedBase, below: LoadedBase, files: AdapterFiles, number: int) -> MergedBase:
    """Merge one adapter.

    Args:
        base: The base, whose memory the result shares.
        below: What the adapter is put on: the base, with the adapters before this one merged into it.
        files: The adapter's files.
        number: Its place in the spec's list, from 1.
    """
    brought = adapter_tokenizer(below, files)
    tokenizer = below.tokenizer if brought is None else brought.tokenizer
    adapter = attach(below, files, tokenizer)
    model = _merged_tree(adapter, number)
    ways = base.pristine.memory.settle(model, _places(base.pristine.model, model))
    own = {id(tensor): tensor for tensor in tensors_of(model) if id(tensor) not in ways}.values()
    again = partial(_merged_tree, adapter, number)
    pristine = Pristine(model, again, ways=ways, own=own, trial=base.may_hide_something)
    record = brought or (below.brought if isinstance(below, MergedBase) else None)
    lacks = frozenset(name for name in below.lacks if ROOT + name not in (files.entries or ()))
    merged = MergedBase(base, pristine, record, lacks)
    with explained(below, files, tokenizer):
        verify_effect(below, merged.side, adapter.files)
    return merged


def _merged_tree(adapter: Adapter, number: int) -> Any:
    tree = adapter.pristine.tree()
    for name, tensor in tree.named_parameters(remove_duplicate=False):
        if any(part in name for part in OF_BASE):
            own_before_write(tensor)  # PEFT writes to it when it merges
    try:
        with quiet_process():
            model = tree.merge_and_unload()
    except Exception as error:
        if isinstance(error, SwayError) or out_of_memory(error):
            raise
        raise SpecError(
            not_merged(adapter.files.folder, number, f"PEFT says: {said(error).removesuffix('.')}")
        ) from error
    model.requires_grad_(False)
    return model


def _places(base: Any, merged: Any) -> dict[int, Any]:
    """Return a merged model's modules and tensors by the ``id`` of the base's of the same name."""
    import torch

    ours, theirs = _tensors(base), _tensors(merged)
    places: dict[int, Any] = {}
    for name, tensor in ours.items():
        there, before = theirs.get(name), places.get(id(tensor))
        if there is None or before is there:
            continue
        if before is None or not torch.equal(before, tensor):  # merging has untied two weights: one may be as it was
            places[id(tensor)] = there
    modules = dict(modules_of(merged))
    return places | {id(module): modules[name] for name, module in modules_of(base) if name in modules}


def _tensors(model: Any) -> dict[str, Any]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
