"""Make trees in which an adapter is scaled, or replaced by noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.mlx.model.trees import modules_of, put_arrays, tree_of
from pytest_sway.errors import BackendUseError

if TYPE_CHECKING:
    from pytest_sway.backends.mlx.adapters.attach import Adapter

__tracebackhide__ = True


def scaled(adapter: Adapter, lam: float) -> Any:
    """Return a tree in which the adapter's LoRA terms are multiplied by ``lam``."""
    _require_lora(adapter, "as_scaled_adapter")
    model = tree_of(adapter.model)
    modules = modules_of(model)
    for name in adapter.layers:
        modules[name].scale *= lam
    return model


def null(adapter: Adapter, seed: int, scale: float) -> Any:
    """Return a tree with noise in place of the adapter's LoRA matrices, each from ``N(0, scale**2)``."""
    _require_lora(adapter, "as_null_adapter")
    import mlx.core as mx

    matrices = {name: array for name, array in sorted(adapter.arrays.items()) if not name.endswith(".m")}
    keys = mx.random.split(mx.random.key(seed % 2**64), len(matrices))
    noise = {
        name: mx.random.normal(array.shape, scale=scale, key=key).astype(array.dtype)
        for key, (name, array) in zip(keys, matrices.items(), strict=True)
    }
    mx.eval(noise)
    model = tree_of(adapter.model)
    put_arrays(model, noise)
    return model


def _require_lora(adapter: Adapter, what: str) -> None:
    if not adapter.layers:
        raise BackendUseError(
            f"{what} needs a LoRA adapter, but {str(adapter.files.folder)!r} is a full fine-tune, whose weights replace"
            " the base's. Use as_finetuned()."
        )
