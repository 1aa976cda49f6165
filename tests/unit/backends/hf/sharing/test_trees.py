"""Trees of models: every object is new, and references to the original become references to the tree."""

from __future__ import annotations

import functools
import inspect
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_sway.backends.hf.sharing import trees
from pytest_sway.backends.hf.sharing.trees import shares_objects, tensors_of, tree_of
from tests.unit.backends.hf.reference import fresh

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _zeros(tensor: Any) -> Any:
    """Return zero weights, so that a tree's results show whose weights it uses."""
    zeros = torch.zeros_like(tensor)
    return nn.Parameter(zeros, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros


class _Model(nn.Module):
    """A layer, and any attributes that a test adds."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, states: Any) -> Any:
        return self.layer(states)


def model_with(**attributes: Any) -> Any:
    """Return a model with the given attributes."""
    return _Model(**attributes)


def _computes(function: Callable[[Any], Any]) -> bool:
    """Whether a function computes with the model's weights; a tree's weights are all zero."""
    return bool(function(torch.ones(3)).any())


def _is_noticed(tree: Any, model: Any) -> bool:
    """Whether a tree can reach its model, which is seen from what it has taken as from the whole tree."""
    taken: list[Any] = []
    tree_of(model, _zeros, taken=taken)
    noticed = shares_objects(tree, model)
    assert shares_objects(taken, model) == noticed
    return noticed


def _require_own(tree: Any, model: Any) -> None:
    assert not _is_noticed(tree, model)
    assert _computes(model)
    assert not _computes(tree)


def test_all_modules_and_tensors_of_a_tree_are_new() -> None:
    model = nn.Sequential(model_with(), nn.BatchNorm1d(3), nn.Embedding(5, 3))
    tree = tree_of(model, _zeros)
    things = {id(thing) for thing in (*model.modules(), *tensors_of(model))}
    copies = {id(thing) for thing in (*tree.modules(), *tensors_of(tree))}
    assert len(copies) == len(things)
    assert not copies & things
    assert [type(module) for module in tree.modules()] == [type(module) for module in model.modules()]
    assert [name for name, _ in tree.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_settings_of_a_tree_are_its_own() -> None:
    model = model_with(config={"layers": [1, 2]}, names=("a",), kinds={"x"}).eval()
    tree = tree_of(model, _zeros)
    tree.config["layers"].append(3)
    tree.kinds.add("y")
    tree.train()
    tree.layer.register_forward_hook(lambda *_: None)
    assert model.config == {"layers": [1, 2]}
    assert model.kinds == {"x"}
    assert not model.layer.training
    assert not model.layer._forward_hooks
    assert tree.names == ("a",)


def test_tied_parameters_stay_tied() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    tree = tree_of(model, _zeros)
    assert tree["head"].weight is tree["embed"].weight
    assert tree["head"].weight is not model["head"].weight


def test_a_module_in_two_places_stays_one() -> None:
    layer = nn.Linear(3, 3)
    tree = tree_of(nn.Sequential(layer, layer), _zeros)
    assert tree[0] is tree[1]
    assert tree[0] is not layer


def test_a_module_that_refers_back_to_its_parent_refers_to_the_trees() -> None:
    model = model_with()
    object.__setattr__(model.layer, "parent", model)
    model.layer.parents = [model]
    tree = tree_of(model, _zeros)
    assert tree.layer.parent is tree
    assert tree.layer.parents[0] is tree
    _require_own(tree, model)


def _closing_over(model: Any) -> Any:
    original = model.forward
    return lambda states: original(states) * 2


def _closing_twice(model: Any) -> Any:
    inner = _closing_over(model)
    return lambda states: inner(states) + inner(states)


def _named(states: Any, module: Any) -> Any:
    return module.layer(states)


def _of_module(module: Any) -> Any:
    return lambda self, states: module(states)


def _with_layer(layer: Any) -> Any:
    def forward(self: Any, states: Any, layer: Any = layer) -> Any:
        return layer(states)

    return forward


def _with_keyword(layer: Any) -> Any:
    def forward(self: Any, states: Any, *, layer: Any = layer) -> Any:
        return layer(states)

    return forward


def _first(module: Any, model: Any, states: Any) -> Any:
    return module(states)


def _calling(functions: Any) -> Any:
    return lambda states: functions[0](states) * 2


def _in_turns(layer: Any) -> Any:
    def forward(self: Any, states: Any, turns: int = 2) -> Any:
        return other(self, states, turns - 1) if turns else layer(states)

    def other(self: Any, states: Any, turns: int) -> Any:
        return forward(self, states, turns)

    return forward


FORWARDS: dict[str, Callable[[Any], Any]] = {
    "a closure over a method": _closing_over,
    "a closure over a closure": _closing_twice,
    "a closure over the module": lambda model: lambda states: model.layer(states) * 2,
    "a method": lambda model: model.layer.forward,
    "a partial of a method": lambda model: functools.partial(model.layer.forward),
    "a partial with a keyword": lambda model: functools.partial(_named, module=model),
    "a method of a closure": lambda model: types.MethodType(_of_module(model.layer), model),
    "a method of a function with a default": lambda model: types.MethodType(_with_layer(model.layer), model),
    "a method of a function with a keyword": lambda model: types.MethodType(_with_keyword(model.layer), model),
    "a method of a partial": lambda model: types.MethodType(functools.partial(_first, model.layer), model),
    "a closure over a method of a closure": lambda model: _calling((types.MethodType(_of_module(model.layer), model),)),
    "a method of functions that call each other": lambda model: types.MethodType(_in_turns(model.layer), model),
    "a closure over a list": lambda model: _calling([model.layer]),
    "a closure over keys": lambda model: _of_keys({model.layer: 1}),
    "a default of itself": lambda model: _of_itself(model.layer),
    "a closure over a weak reference": lambda model: _of_weak(weakref.ref(model)),
}


def _of_keys(layers: Any) -> Any:
    return lambda states: next(iter(layers))(states) * 2


def _of_itself(layer: Any) -> Any:
    def forward(states: Any, again: Any = None) -> Any:
        return layer(states) if again is None else again(states, None)

    forward.__defaults__ = (forward,)
    return forward


def _of_weak(reference: Any) -> Any:
    return lambda states: reference().layer(states)


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_forward_that_was_put_on_a_module_computes_with_the_trees_own_weights(forward: str) -> None:
    model = model_with()
    model.forward = FORWARDS[forward](model)
    tree = tree_of(model, _zeros)
    _require_own(tree, model)


def test_the_attributes_of_a_partial_refer_to_the_tree() -> None:
    model = model_with()
    model.forward = functools.partial(_first, model.layer, model)
    model.forward.layers, model.forward.itself, model.forward.name = [model.layer], model.forward, "it"
    tree = tree_of(model, _zeros)
    assert tree.forward.layers == [tree.layer]
    assert tree.forward.itself is tree.forward
    assert tree.forward.name == "it"
    _require_own(tree, model)


def test_a_forward_that_accelerate_has_wrapped_keeps_its_signature() -> None:
    """It does so if a model is spread over several devices."""
    hooks: Any = import_module("accelerate.hooks")
    model = model_with()
    signature = inspect.signature(model.forward)
    hooks.add_hook_to_module(model, hooks.ModelHook())
    tree = tree_of(model, _zeros)
    assert inspect.signature(tree.forward) == inspect.signature(model.forward) == signature
    assert tree.forward.__wrapped__.__self__ is tree
    _require_own(tree, model)


def test_functions_that_share_a_variable_share_the_trees() -> None:
    model, calls = model_with(), 0

    def count(states: Any) -> Any:
        nonlocal calls
        calls += 1
        return model.layer(states)

    model.forward, model.calls = count, lambda: (calls, model.layer)
    tree = tree_of(model, _zeros)
    tree(torch.ones(3))
    assert tree.calls() == (1, tree.layer)
    assert calls == 0


def _called(read: Any) -> Any:
    return read()


@pytest.mark.parametrize("order", [("forward", "calls"), ("calls", "forward")], ids=" before ".join)
@pytest.mark.parametrize(
    "way", [lambda read: read, lambda read: functools.partial(_called, read)], ids=["itself", "in a partial"]
)
def test_a_function_without_parts_of_the_model_shares_its_variables_with_those_that_have_some(
    order: tuple[str, str], way: Callable[[Any], Any]
) -> None:
    model, calls = model_with(), 0

    def count(states: Any) -> Any:
        nonlocal calls
        calls += 1
        return model.layer(states)

    made = {"forward": count, "calls": way(lambda: calls)}
    vars(model).update((name, made[name]) for name in order)
    tree = tree_of(model, _zeros)
    tree(torch.ones(3))
    assert (tree.calls(), model.calls()) == (1, 0)


def _counting(calls: Any) -> Any:
    def forward(states: Any) -> Any:
        calls.append(states)
        return states

    return forward


@pytest.mark.parametrize("order", [("forward", "calls"), ("calls", "forward")], ids=" before ".join)
def test_a_function_that_writes_to_a_list_of_the_model_writes_to_the_trees(order: tuple[str, str]) -> None:
    model = model_with()
    calls: list[Any] = []
    made = {"calls": calls, "forward": _counting(calls)}
    vars(model).update((name, made[name]) for name in order)
    tree = tree_of(model, _zeros)
    tree(torch.ones(3))
    assert (len(tree.calls), len(model.calls)) == (1, 0)


def test_a_function_that_writes_to_a_list_of_a_copied_object_writes_to_the_trees() -> None:
    calls: list[Any] = []
    model = model_with(holder=types.SimpleNamespace(calls=calls), forward=_counting(calls))
    tree = tree_of(model, _zeros)
    tree(torch.ones(3))
    assert (len(tree.holder.calls), len(calls)) == (1, 0)


def test_a_function_of_nothing_of_the_model_stays_as_it_is() -> None:
    lock = threading.Lock()
    model = model_with(guard=lambda: lock, names=("a",))
    assert tree_of(model, _zeros).guard is model.guard


def test_functions_are_not_looked_for_in_a_model_that_has_none_of_its_own(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take longer than all else."""
    model, _ = fresh(base, adapter)
    monkeypatch.setattr(trees, "functions_to_copy", lambda _: pytest.fail("they were looked for"))
    tree_of(model, _zeros)


def test_hooks_go_along_and_see_the_tree() -> None:
    model, seen = model_with(), []
    model.layer.register_forward_hook(lambda module, args, output: seen.append(module))
    tree = tree_of(model, _zeros)
    tree(torch.ones(3))
    assert seen == [tree.layer]


def test_a_weak_reference_is_to_the_trees_module() -> None:
    model = model_with()
    model.reference = weakref.ref(model.layer)
    tree = tree_of(model, _zeros)
    assert tree.reference() is tree.layer
    _require_own(tree, model)


def test_a_weak_reference_to_something_else_stays() -> None:
    other = nn.Linear(2, 2)
    tree = tree_of(model_with(reference=weakref.ref(other)), _zeros)
    assert tree.reference() is other


HIDING: dict[str, Callable[[Any], Any]] = {
    "a list": lambda module: [module],
    "a tuple": lambda module: (module, 1),
    "a dictionary": lambda module: {"it": module},
    "an ordered dictionary": lambda module: OrderedDict(it=module),
    "a set": lambda module: {module},
    "a default dictionary": lambda module: defaultdict(list, it=[module]),
    "a deque": lambda module: deque([module]),
    "lists in lists": lambda module: [[module], {"it": (module,)}],
}


def _hidden_in(thing: Any) -> Any:
    while not isinstance(thing, nn.Module):
        thing = next(iter(thing.values() if isinstance(thing, dict) else thing))
    return thing


@pytest.mark.parametrize("container", HIDING)
@pytest.mark.parametrize("known", [True, False], ids=["a module of the model", "a hidden module"])
def test_a_module_in_a_container_is_the_trees_own(container: str, known: bool) -> None:
    model = model_with()
    hidden = model.layer if known else nn.Linear(3, 3)
    model.hidden = HIDING[container](hidden)
    tree = tree_of(model, _zeros)
    found = _hidden_in(tree.hidden)
    assert found is not hidden
    assert found.weight is not hidden.weight
    assert (found is tree.layer) == known
    assert type(tree.hidden) is type(model.hidden)
    _require_own(tree, model)


class SamplingParams(dict[str, Any]):
    """A dictionary with attributes, like many configurations."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def test_a_subclass_of_a_dictionary_stays_one_and_is_the_trees_own() -> None:
    model = model_with()
    model.settings = SamplingParams(size=3, layers=[1], module=model.layer)
    tree = tree_of(model, _zeros)
    assert type(tree.settings) is SamplingParams
    assert tree.settings.module is tree.layer
    tree.settings["layers"].append(2)
    assert model.settings == {"size": 3, "layers": [1], "module": model.layer}
    _require_own(tree, model)


def test_an_object_that_holds_the_model_holds_the_tree() -> None:
    class Holder:
        def __init__(self, module: Any) -> None:
            self.module = module

    model = model_with()
    model.holder = Holder(model)
    tree = tree_of(model, _zeros)
    assert tree.holder is not model.holder
    assert tree.holder.module is tree
    _require_own(tree, model)


def test_a_list_and_a_dictionary_that_contain_themselves_end() -> None:
    model = model_with(ring=[], table={})
    model.ring.append(model.ring)
    model.table["it"] = model.table
    tree = tree_of(model, _zeros)
    assert tree.ring[0] is tree.ring
    assert tree.table["it"] is tree.table
    assert tree.ring is not model.ring


def test_a_tensor_that_is_a_plain_attribute_is_shared_as_all_are() -> None:
    model = model_with(scale=torch.full((3,), 2.0))
    tree = tree_of(model, _zeros)
    assert tree.scale.tolist() == [0.0] * 3
    assert model.scale.tolist() == [2.0] * 3


def test_what_is_known_stands_for_itself_and_all_else_is_added() -> None:
    model = model_with()
    weight = nn.Parameter(torch.ones(3, 3))
    known: dict[int, Any] = {id(model.layer.weight): weight}
    tree = tree_of(model, _zeros, known)
    assert tree.layer.weight is weight
    assert known[id(model.layer)] is tree.layer
    assert known[id(model.layer.bias)] is tree.layer.bias


def test_what_cannot_be_copied_is_an_error() -> None:
    with pytest.raises(TypeError, match="lock"):
        tree_of(model_with(lock=threading.Lock()), _zeros)


def _with_default(module: Any) -> Any:
    def forward(states: Any, module: Any = module) -> Any:
        return module(states)

    return forward


def _with_keyword_default(module: Any) -> Any:
    def forward(states: Any, *, module: Any = module) -> Any:
        return module(states)

    return forward


FOREIGN: dict[str, Callable[[Any], Any]] = {
    "itself": lambda layer: layer,
    "its tensor": lambda layer: layer.weight,
    "a list": lambda layer: [{"it": (layer,)}],
    "a set": lambda layer: {layer},
    "a closure": lambda layer: lambda: layer,
    "a keyword of a partial": lambda layer: functools.partial(print, end=layer),
    "a default": _with_default,
    "a keyword's default": _with_keyword_default,
    "a method": lambda layer: layer.forward,
    "a method of a closure": lambda layer: types.MethodType(lambda self: layer, object()),
    "a partial": lambda layer: functools.partial(print, layer),
    "an attribute of a partial": lambda layer: functools.update_wrapper(functools.partial(print), layer.forward),
    "a weak reference": weakref.ref,
}


@pytest.mark.parametrize("way", FOREIGN)
def test_a_tree_from_which_the_original_can_be_reached_is_noticed(way: str) -> None:
    model = model_with()
    tree = tree_of(model, _zeros)
    assert not shares_objects(tree, model)
    tree.layer.__dict__["foreign"] = FOREIGN[way](model.layer)
    assert shares_objects(tree, model)


@pytest.mark.parametrize("forward", [_with_default, _with_keyword_default], ids=["positional", "keyword"])
def test_a_forward_whose_default_is_a_module_is_the_trees_own_or_noticed(forward: Any) -> None:
    model = model_with()
    model.forward = forward(model.layer)
    tree = tree_of(model, _zeros)
    assert _computes(model)
    assert _is_noticed(tree, model) == _computes(tree)


def test_a_method_of_a_tensor_is_the_trees_own_or_noticed() -> None:
    model = model_with()
    model.forward = model.layer.weight.matmul
    tree = tree_of(model, _zeros)
    assert _computes(model)
    assert _is_noticed(tree, model) == _computes(tree)


def test_modules_come_as_in_torch_each_once_in_order(base: Path, adapter: Path) -> None:
    from peft import PeftModel

    from pytest_sway.backends.hf.sharing.trees import modules_of

    model, _ = fresh(base, adapter)
    assert isinstance(model, PeftModel)
    model.twice = model.base_model
    assert modules_of(model) == list(model.named_modules())
