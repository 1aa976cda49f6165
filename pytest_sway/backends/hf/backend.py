"""`HFBackend`: a base and an adapter or fine-tuned model, as two views."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.adapters import overlays
from pytest_sway.backends.hf.hygiene.memory import find_leak
from pytest_sway.backends.hf.loading.libraries import forget_layers
from pytest_sway.backends.hf.model.bound_model import BoundModel
from pytest_sway.backends.libraries.process import no_warnings
from pytest_sway.backends.local.pooled_backend import PooledBackend
from pytest_sway.backends.local.pooled_view import PooledView
from pytest_sway.backends.local.tokenizer_copies import copied_for_test

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.backends.checkpoints.plan import Plan
    from pytest_sway.backends.hf.hygiene.memory import WeightsWatch
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.hf.model.bound_model import Adapter
    from pytest_sway.backends.local.leaks import Leak
    from pytest_sway.backends.local.pooled_backend import Loaded

__tracebackhide__ = True


class HFBackend(PooledBackend[BoundModel, PooledView]):
    """A Hugging Face model with its PEFT adapter or its fine-tuned model. `HFBuilder.build` makes it.

    Args:
        plan: The plan that it was built from.
        loaded: What was loaded for it.
        withdraw: Called with a changed base, so that no other backend gets it.
        views: Makes a view from its id and this backend.
    """

    _shares_tokenizers = True

    def __init__(
        self,
        plan: Plan,
        loaded: Loaded[BoundModel],
        withdraw: Callable[[Any], None],
        views: Callable[[str, HFBackend], PooledView],
    ) -> None:
        super().__init__(plan, loaded, withdraw)
        self._views = views

    def leak(self) -> Leak | None:
        """Return the weights still in memory after the close; ``None`` if all are freed, or before the close."""
        return find_leak(self._watches)

    def _new_view(self, view_id: str) -> PooledView:
        return self._views(view_id, self)

    def _computed(self, side: BoundModel, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        import torch

        with side.engine() as engine:
            forward = engine.forward
            warns = engine.model is not forward.model or forward.one_text_at_a_time
            quiet = no_warnings() if warns else nullcontext()
            with quiet, torch.inference_mode():
                return work(engine, *args)

    def _new_model(self, side: BoundModel) -> Any:
        return side.tree()

    def _new_tokenizer(self, side: BoundModel) -> Any:
        return copied_for_test(side.tokenizer)

    def _scaled(self, side: BoundModel, adapter: Adapter, lam: float) -> BoundModel:
        return overlays.scaled(side, adapter, lam)

    def _null(self, side: BoundModel, adapter: Adapter, seed: int, scale: float) -> BoundModel:
        return overlays.null(side, adapter, seed, scale)

    def _watches_of(self, what: LoadedBase | Adapter) -> list[WeightsWatch]:
        return what.watches.all()

    def _put_back(self, base: LoadedBase) -> list[str]:
        patches = base.patches()
        if patches:
            base.undo_patches()
        return patches

    def _let_go(self, loaded: Loaded[BoundModel]) -> None:
        super()._let_go(loaded)
        if loaded.adapter is not None:
            forget_layers()
