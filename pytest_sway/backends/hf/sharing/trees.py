"""Trees: models with objects of their own, over memory that they share with the model they were made from.

Every module, parameter, buffer and attribute of a tree is a new object. A reference within the model becomes a
reference within the tree. So hooks, modes, configs and adapters of one tree do not affect another. `copy.deepcopy` does
this too, but takes seven times as long, because a model is mostly empty dictionaries.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.sharing.references import EMPTY, PLAIN, functions_to_copy, inside, refers_to_nothing
from pytest_sway.system.garbage import no_collections

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__tracebackhide__ = True


def tree_of(
    model: Any, share: Callable[[Any], Any], known: dict[int, Any] | None = None, taken: list[Any] | None = None
) -> Any:
    """Return a tree of ``model``.

    Args:
        model: A ``torch.nn.Module``.
        share: Returns the tree's tensor for one of the model's.
        known: The tree's objects, by the ``id`` of the model's objects that they replace; new ones are added.
        taken: Filled with the only objects of the tree that may refer to the model: those that are not made here part
            by part.

    Raises:
        Exception: Something in the model cannot be copied; the error comes from `copy`.
    """
    with no_collections():
        return _Copier(model, share, {} if known is None else known, [] if taken is None else taken).tree_of(model)


def modules_of(model: Any) -> list[tuple[str, Any]]:
    """Return what ``model.named_modules()`` yields, in a third of the time."""
    found, seen, pending = [], set[int](), [("", model)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        for key, child in reversed(module._modules.items()):
            if child is not None:
                pending.append((f"{name}.{key}" if name else key, child))
    return found


def tensors_of(model: Any) -> Iterator[Any]:
    """Yield every parameter and buffer of a model; a tied tensor appears once for each place."""
    for _, module in modules_of(model):
        for members in (module._parameters, module._buffers):
            yield from (tensor for tensor in members.values() if tensor is not None)


def shares_objects(tree: Any, original: Any) -> bool:
    """Return whether a tree, or what it has taken (see `tree_of`), can reach any module or tensor of ``original``.

    Such a tree would compute with, or write to, another model's objects. The usual cause is a closure.
    """
    foreign = {id(thing) for thing in (*original.modules(), *tensors_of(original))}
    seen: set[int] = set()
    pending: list[Any] = [tree]
    while pending:
        thing = pending.pop()
        if type(thing) in PLAIN or id(thing) in seen:
            continue
        if id(thing) in foreign:
            return True
        seen.add(id(thing))
        pending.extend(inside(thing))
    return False


def put_attributes_within(made: Any, tensor: Any, known: Mapping[int, Any]) -> None:
    """Let the attributes of a tree's tensor refer to the tree: a quantized weight may refer to its module.

    Args:
        made: The tree's tensor.
        tensor: The model's tensor, which ``made`` was made from.
        known: The tree's objects, by the ``id`` of the model's objects that they replace.
    """
    vars(made).update({name: known[id(value)] for name, value in vars(tensor).items() if id(value) in known})


def attributes_of(tensor: Any, made: Any) -> dict[int, Any]:
    """Return the attributes of ``made`` by the ``id`` of those of ``tensor`` that they replace.

    A module may refer to what its weight has, such as the scales of bitsandbytes.
    """
    new, old = vars(made), vars(tensor)
    own = [name for name in old.keys() & new.keys() if new[name] is not old[name] and type(old[name]) not in PLAIN]
    return {id(old[name]): new[name] for name in own}


class _Copier:
    """Copies modules and their attributes.

    Args:
        model: The model that the tree is of.
        share: Returns the tree's tensor for one of the model's.
        memo: The copies, by the ``id`` of the originals; `copy.deepcopy` uses the same.
        taken: See `tree_of`.
    """

    def __init__(self, model: Any, share: Callable[[Any], Any], memo: dict[int, Any], taken: list[Any]) -> None:
        import torch

        self._model = model
        self._share = share
        self._memo = memo
        self._taken = taken
        self._tensor, self._module = torch.Tensor, torch.nn.Module
        self._plain = PLAIN | {torch.dtype, torch.device, torch.Size}
        self._own_containers = {
            name for name, value in vars(torch.nn.Module()).items() if isinstance(value, dict | set)
        }

    @functools.cached_property
    def _functions(self) -> set[int]:
        """The ids of the functions to copy. Few models have any, so they are looked for on demand."""
        return functions_to_copy(self._model)

    def tree_of(self, model: Any) -> Any:
        """Return a copy of a module with all modules in it."""
        modules = [module for _, module in modules_of(model) if id(module) not in self._memo]
        for module in modules:
            self._memo[id(module)] = module.__class__.__new__(module.__class__)
        with_attributes = []
        for module in modules:
            for members in (module._parameters, module._buffers):
                for tensor in members.values():
                    if tensor is not None and id(tensor) not in self._memo:
                        self._memo[id(tensor)] = made = self._share(tensor)
                        if vars(tensor):
                            with_attributes.append((tensor, made))
        for tensor, made in with_attributes:
            put_attributes_within(made, tensor, self._memo)
            self._taken += vars(made).values()
            self._memo |= attributes_of(tensor, made)
        for module in modules:
            self._fill(module)
        return self._memo[id(model)]

    def _fill(self, module: Any) -> None:
        """Give the copy of ``module`` its attributes."""
        filled = vars(self._memo[id(module)])
        for name, value in vars(module).items():
            kind = type(value)
            if kind in self._plain:
                filled[name] = value
            elif name in self._own_containers and not value:  # mostly hooks, which each module has for itself
                filled[name] = kind()
            else:
                filled[name] = self._copied(value)

    def _copied(self, value: Any) -> Any:
        kind = type(value)
        if kind in self._plain:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, self._module):  # its parent hides it from `modules()`
            return self.tree_of(value)
        copied = self._copy_of(value, kind)
        self._memo[id(value)] = copied
        if kind not in _MADE_OF_PARTS:
            self._taken.append(copied)
        return copied

    def _copy_of(self, value: Any, kind: type) -> Any:
        if isinstance(value, self._tensor):
            return self._share(value)
        copy_of = _BY_KIND.get(kind)
        return copy.deepcopy(value, self._memo) if copy_of is None else copy_of(self, value)

    def _tuple(self, value: Any) -> Any:
        return tuple(map(self._copied, value))

    def _method(self, method: Any) -> Any:
        function, owner = method.__func__, self._copied(method.__self__)
        of_class = getattr(type(owner), getattr(function, "__name__", ""), None) is function
        return types.MethodType(function if of_class else self._copied(function), owner)

    def _builtin_method(self, method: Any) -> Any:
        there = self._memo.get(id(method.__self__))
        return method if there is None else getattr(there, method.__name__)

    def _partial(self, value: Any) -> Any:
        keywords = {name: self._copied(argument) for name, argument in value.keywords.items()}
        made = functools.partial(self._copied(value.func), *map(self._copied, value.args), **keywords)
        self._memo[id(value)] = made  # its attributes may refer to it
        vars(made).update({name: self._copied(each) for name, each in vars(value).items()})  # such as __wrapped__
        return made

    def _weak_reference(self, reference: Any) -> Any:
        there = self._memo.get(id(reference()))
        return reference if there is None else weakref.ref(there)

    def _list(self, value: Any) -> Any:
        copied = self._memo[id(value)] = []  # registered before its members, which may refer to it
        copied.extend(map(self._copied, value))
        return copied

    def _set(self, value: Any) -> Any:
        copied = self._memo[id(value)] = set()
        copied.update(map(self._copied, value))
        return copied

    def _dict(self, value: Any) -> Any:
        copied = self._memo[id(value)] = type(value)()
        if value:
            copied.update((self._copied(key), self._copied(member)) for key, member in value.items())
        return copied

    def _has_copied(self, things: Iterable[Any]) -> bool:
        return any(self._memo.get(id(each), each) is not each for each in things)

    def _function(self, function: Any) -> Any:
        """Copy a function with its closure and defaults if the tree needs one of its own; else return it as it is."""
        if refers_to_nothing(function) or not (self._has_copied(inside(function)) or id(function) in self._functions):
            return function
        cells = function.__closure__ or ()
        new = [cell for cell in cells if id(cell) not in self._memo]
        self._memo.update((id(cell), types.CellType()) for cell in new)
        copied = self._memo[id(function)] = types.FunctionType(  # registered before its parts, which may refer to it
            function.__code__,
            function.__globals__,
            function.__name__,
            None,
            tuple(self._memo[id(cell)] for cell in cells) or None,
        )
        copied.__defaults__ = self._copied(function.__defaults__)
        for cell in new:
            if cell != EMPTY:
                self._memo[id(cell)].cell_contents = self._copied(cell.cell_contents)
        copied.__kwdefaults__ = self._copied(function.__kwdefaults__)
        copied.__dict__.update(self._copied(function.__dict__))
        return copied


_BY_KIND: Final[dict[Any, Any]] = {
    OrderedDict: _Copier._dict,
    dict: _Copier._dict,
    functools.partial: _Copier._partial,
    list: _Copier._list,
    set: _Copier._set,
    tuple: _Copier._tuple,
    types.BuiltinMethodType: _Copier._builtin_method,
    types.FunctionType: _Copier._function,
    types.MethodType: _Copier._method,
    weakref.ref: _Copier._weak_reference,
}
"""How to copy the kinds of objects that models mostly consist of; `copy.deepcopy` copies the others."""

_MADE_OF_PARTS: Final = frozenset({OrderedDict, dict, functools.partial, list, set, tuple, types.MethodType})
"""The kinds whose copies are new and have only copies in them."""
