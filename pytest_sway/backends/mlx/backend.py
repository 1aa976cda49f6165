"""`MLXBackend`: a base and an adapter on it, as two views on one set of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.local.pooled_backend import PooledBackend
from pytest_sway.backends.mlx.adapters.attach import null, scaled
from pytest_sway.backends.mlx.model.base import own_tokenizer_of
from pytest_sway.backends.mlx.model.bound_model import BoundModel
from pytest_sway.backends.mlx.model.placement import computing_on
from pytest_sway.backends.mlx.model.shared_arrays import find_leak
from pytest_sway.backends.mlx.model.trees import own_tree_of
from pytest_sway.backends.mlx.view import MLXView

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.backends.local.leaks import Leak
    from pytest_sway.backends.mlx.adapters.attach import Adapter
    from pytest_sway.backends.mlx.model.base import LoadedBase
    from pytest_sway.backends.mlx.model.shared_arrays import SharedArrays

__tracebackhide__ = True


class MLXBackend(PooledBackend[BoundModel, MLXView]):
    """A model of mlx-lm with an adapter or a fine-tuned model beside it; made by `MLXBuilder.build`.

    The noise of `as_null_adapter` comes from MLX, and differs from that of kind ``hf``.
    """

    def leak(self) -> Leak | None:
        """Return what its close failed to free; ``None`` if everything is gone, or before the close."""
        return find_leak(self._watches)

    def _new_view(self, view_id: str) -> MLXView:
        return MLXView(view_id, self)

    def _computed(self, side: BoundModel, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with computing_on(side.base.device):
            return work(side.engine(), *args)

    def _new_model(self, side: BoundModel) -> Any:
        adapter = self._require().adapter
        model, copies = own_tree_of(side.model)
        for shared in (side.base.shared, *(() if adapter is None else (adapter.shared,))):
            shared.handed_out(model, copies)
        return model

    def _new_tokenizer(self, side: BoundModel) -> Any:
        return own_tokenizer_of(side.tokenizer)

    def _scaled(self, side: BoundModel, adapter: Adapter, lam: float) -> BoundModel:
        return replace(side, model=scaled(adapter, lam))

    def _null(self, side: BoundModel, adapter: Adapter, seed: int, scale: float) -> BoundModel:
        with computing_on(side.base.device):
            return replace(side, model=null(adapter, seed, scale))

    def _watches_of(self, what: LoadedBase | Adapter) -> list[SharedArrays]:
        return [what.shared]
