"""Trees: models that have modules of their own and share their arrays.

A loaded base is one tree, and a base with an adapter is another. Both are pristine: they are never run, handed out or
changed. The trees that compute, and those that tests get, are made from them. MLX never writes to memory that another
array refers to: ``array[...] = x`` gives the Python object new memory. So a tree with Python objects of its own takes
no memory for its weights, and no write through MLX leaves it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__tracebackhide__ = True


def arrays_of(model: Any) -> dict[str, Any]:
    """Return all arrays in a module by name, including those that are not parameters."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    return {name: leaf for name, leaf in tree_flatten(model) if isinstance(leaf, mx.array)}


def parameters_of(model: Any) -> dict[str, Any]:
    """Return the parameters of a module by name."""
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))


def not_finite(arrays: Mapping[str, Any]) -> list[str]:
    """Return the names of arrays that hold NaN or infinite values, in order."""
    import mlx.core as mx

    finite = {name: mx.isfinite(array).all() for name, array in arrays.items()}
    mx.eval(finite)
    return sorted(name for name, found in finite.items() if not found.item())


def modules_of(model: Any) -> dict[str, Any]:
    """Return all modules of a model by name."""
    return dict(model.named_modules())


def tree_of(model: Any) -> Any:
    """Return a tree of ``model`` with the same Python objects for its arrays. Don't write to them."""
    return copy.deepcopy(model, {id(array): array for array in arrays_of(model).values()})


def own_tree_of(model: Any) -> tuple[Any, dict[int, Any]]:
    """Return a tree of ``model`` for a test, and its objects by the identities of the originals."""
    copies: dict[int, Any] = {}
    return copy.deepcopy(model, copies), copies


def put_arrays(model: Any, arrays: dict[str, Any]) -> None:
    """Replace a model's arrays of these names."""
    from mlx.utils import tree_unflatten

    model.update(tree_unflatten(list(arrays.items())))


def put_modules(model: Any, modules: dict[str, Any]) -> None:
    """Replace a model's modules of these names."""
    from mlx.utils import tree_unflatten

    model.update_modules(tree_unflatten(list(modules.items())))
