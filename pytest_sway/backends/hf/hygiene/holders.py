"""Finds the modules and tensors that keep some storages alive."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.local.leaks import chains_to

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__tracebackhide__ = True


def holders_of(storages: Iterable[int], limit: int = 5) -> list[str]:
    """Describe the chains of references that keep the tensors on some storages alive.

    Args:
        storages: Addresses of storages (`torch.UntypedStorage._cdata`).
        limit: The most chains to return.

    Returns:
        Chains such as ``module tests.test_x global 'KEEP' -> list -> PeftModel``.
    """
    roots, parts = _outermost_holders(set(storages))
    return chains_to(roots, limit, parts)


def _outermost_holders(storages: set[int]) -> tuple[list[Any], set[int]]:
    """Return the outermost holders, and the ids of all modules and tensors that they hold.

    Outermost holders are modules that contain such tensors and are in no other such module, and tensors in no module.
    """
    import torch

    tensors, modules = [], []
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, torch.Tensor):
            if _on_storage(thing, storages):
                tensors.append(thing)
        elif issubclass(kind, torch.nn.Module) and "_modules" in vars(thing):
            modules.append(thing)
    wanted = {id(tensor) for tensor in tensors}
    holding = {id(module): module for module in modules if any(id(tensor) in wanted for tensor in _own_tensors(module))}
    inside = {id(tensor) for module in holding.values() for tensor in _own_tensors(module)}
    outer, parents = dict(holding), _parents(modules)
    while True:
        wanted |= outer.keys()
        up = {id(parent): parent for module in outer.values() for parent in parents.get(id(module), ())}
        kept = {key: module for key, module in outer.items() if key not in parents}
        if up.keys() <= kept.keys():
            break
        outer = kept | up
    return [*outer.values(), *(tensor for tensor in tensors if id(tensor) not in inside)], wanted


def _own_tensors(module: Any) -> Iterator[Any]:
    yield from module._parameters.values()
    yield from module._buffers.values()


def _on_storage(tensor: Any, storages: set[int]) -> bool:
    try:
        return tensor.untyped_storage()._cdata in storages
    except (RuntimeError, NotImplementedError):  # a tensor without storage, such as a sparse or a fake one
        return False


def _parents(modules: list[Any]) -> dict[int, list[Any]]:
    parents: dict[int, list[Any]] = {}
    for module in modules:
        for child in module._modules.values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
    return parents
