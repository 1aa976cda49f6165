"""`HFBackend`: a base and an adapter on it, as two views on one set of weights."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf import sides
from pytest_sway.backends.hf.adapters import take_off
from pytest_sway.backends.hf.inspection import summarised
from pytest_sway.backends.hf.libraries import forget_frames, no_warnings
from pytest_sway.backends.hf.memory import Leak, WeightsWatch, find_leak
from pytest_sway.backends.hf.scores import Engine
from pytest_sway.backends.hf.sides import Side
from pytest_sway.backends.hf.sizes import measured
from pytest_sway.backends.hf.state import BASE_STATE
from pytest_sway.backends.hf.views import HFView
from pytest_sway.backends.preflight import preflight
from pytest_sway.errors import BackendClosedError, BackendUseError, NoAdapterError
from pytest_sway.spec import base_key, resolved_key

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from pytest_sway.backends.hf.adapter import Adapter
    from pytest_sway.backends.hf.base import LoadedBase
    from pytest_sway.backends.hf.inspection import AdapterRecord, TokenizerRecord
    from pytest_sway.backends.shared import Share
    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


@dataclass(slots=True, eq=False)
class Loaded:
    """All that a backend has in memory; what is left of a closed backend does not refer to it.

    Attributes:
        shares: The claims on the bases that it uses; an adapter sits on the last, and a fine-tuned model is the last.
        base: The base's side.
        tuned: The tuned side, if there is one.
        adapter: The adapter, if there is one.
        adapter_record: What the adapter's weights were like.
        tokenizer_record: What the settings of an adapter's tokenizer were.
        views: The sides of the open views that have one of their own.
    """

    shares: list[Share[LoadedBase]]
    base: Side
    tuned: Side | None
    adapter: Adapter | None = None
    adapter_record: AdapterRecord | None = None
    tokenizer_record: TokenizerRecord | None = None
    views: dict[HFView, Side] = field(default_factory=dict)


class HFBackend:
    """A Hugging Face model with a PEFT adapter, or beside what it was fine-tuned to; made by `HFBuilder.build`.

    Any number of views may be open at once, in any number of threads: each call binds its view's state.

    Args:
        spec: The resolved spec that it was built from.
        loaded: What was loaded for it.
        withdraw: Called with a base that is no longer what it was, so that nobody else gets it.
    """

    safe_for_concurrent_views = True

    def __init__(self, spec: ModelSpec, loaded: Loaded, withdraw: Callable[[LoadedBase], None]) -> None:
        self._spec = spec
        self._loaded: Loaded | None = loaded
        self._withdraw = withdraw
        self._watches: list[WeightsWatch] = []

    def __repr__(self) -> str:
        return f"<HFBackend {self._spec}{'' if self._loaded else ', closed'}>"

    @property
    def spec(self) -> ModelSpec:
        """The spec that it was built from, with the device and dtype that were used."""
        return self._spec

    # --- views --------------------------------------------------------------------------------------------------------

    @contextmanager
    def as_base(self) -> Iterator[HFView]:
        """Open a view on the base."""
        with self._view("base", self._require().base) as view:
            yield view

    @contextmanager
    def as_finetuned(self) -> Iterator[HFView]:
        """Open a view on the base with its adapter, or on the fine-tuned model.

        Raises:
            NoAdapterError: The spec has neither.
        """
        with self._view("ft", self._tuned("as_finetuned")) as view:
            yield view

    @contextmanager
    def as_scaled_adapter(self, lam: float) -> Iterator[HFView]:
        """Open a view in which the LoRA terms count ``lam`` times: 0 is the base, 1 the adapter.

        What an adapter has besides, such as DoRA's magnitudes or ``modules_to_save``, stays as it is.

        Raises:
            NoAdapterError: The spec has no adapter.
            BackendUseError: It has no LoRA adapter, or one that changes the base's own weights.
        """
        side, adapter = self._tuned("as_scaled_adapter"), self._adapter("as_scaled_adapter")
        overlay = sides.scaled(adapter, lam)
        with self._view(f"scaled_{lam:.2f}", side.with_overlay(overlay)) as view:
            yield view

    @contextmanager
    def as_null_adapter(self, seed: int, *, init_scale: float = 0.02, rank_scale: float = 1.0) -> Iterator[HFView]:
        """Open a view with noise in place of the LoRA matrices, each from ``N(0, init_scale**2 * rank_scale)``.

        Args:
            seed: Where the noise starts; equal seeds give dlm-sway's noise.
            init_scale: Standard deviation.
            rank_scale: The rank that the noise stands for, as a multiple of the adapter's.

        Raises:
            ValueError: ``rank_scale`` is not positive and finite.
            NoAdapterError: The spec has no adapter.
            BackendUseError: It has no LoRA adapter, or one that changes the base's own weights.
        """
        side, adapter = self._tuned("as_null_adapter"), self._adapter("as_null_adapter")
        overlay = sides.null(adapter, seed, init_scale, rank_scale)
        view_id = f"null_{seed}" if rank_scale == 1.0 else f"null_{seed}_rank{rank_scale:.2f}"
        with self._view(view_id, side.with_overlay(overlay)) as view:
            yield view

    # --- for the cache, the hygiene and dlm-sway ----------------------------------------------------------------------

    def cache_identity(self) -> str:
        """Return what dlm-sway's own backend returns for this base and adapter, or fine-tuned model."""
        return f"hf:{self._spec.base}:{self._spec.finetuned or self._spec.adapter}"

    def preflight_finite_check(self) -> tuple[bool, str]:
        """Score one prompt on each side; return ``(True, "")``, or ``(False, reason)``."""
        alone = self._spec.adapter is None and self._spec.finetuned is None
        return preflight({"base": self.as_base} | ({} if alone else {"ft": self.as_finetuned}))

    def sizes(self) -> Mapping[Hashable, int]:
        """Return the bytes that each part takes in memory, keyed as in `HFBuilder.estimate`."""
        loaded = self._require()
        sizes: dict[Hashable, int] = {}
        for share in loaded.shares:
            base = share.value
            key = base_key(base.spec) if base.shared else ("own base", *resolved_key(self._spec))
            sizes[key] = base.nbytes
        if loaded.adapter is not None:
            sizes["adapter", *resolved_key(self._spec)] = measured(loaded.adapter.parameters.values())
        return sizes

    def changes(self) -> list[str]:
        """Return one line for each thing that is no longer as it was after the load; empty when nothing is.

        A shared base that was changed is handed out to nobody else.

        Raises:
            BackendClosedError: It was closed.
        """
        loaded = self._require()
        brought = [] if loaded.tokenizer_record is None else loaded.tokenizer_record.changes()
        lines = brought
        for i, share in enumerate(loaded.shares):
            base = share.value
            with base.lock:
                found = base.changes()
            if found or brought:
                self._withdraw(base)
            whose = "fine-tuned model: " if i and self._spec.finetuned else ""
            lines = [*lines, *(whose + line for line in found if line not in lines)]
        if loaded.adapter_record is not None:
            base = loaded.shares[-1].value
            with base.lock, base.switch.bound(BASE_STATE):
                lines += loaded.adapter_record.changes()
        return summarised(lines)

    def close(self) -> None:
        """Take the adapter off and give the base back; the last to use it frees it. Closing twice is harmless."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        shares = loaded.shares
        try:
            self._take_off(loaded)
        except BaseException as error:
            forget_frames(error)
            raise
        finally:
            del loaded  # its sides refer to the model, which has to be gone when its base is closed
            self._release(shares)

    def leak(self) -> Leak | None:
        """Return what its close should have freed and did not; ``None`` if all is gone, or before the close."""
        return find_leak(self._watches)

    def _take_off(self, loaded: Loaded) -> None:
        for side in list(loaded.views.values()):  # another thread may open one meanwhile
            if side.state.overlay is not None:
                with side.base.lock:
                    side.base.switch.drop(side.state.overlay)
        if loaded.adapter is not None:
            self._watches.append(WeightsWatch(loaded.adapter.parameters.values()))
            take_off(loaded.shares[-1].value, loaded.adapter)

    def _release(self, shares: list[Share[LoadedBase]]) -> None:
        bases = [share.value for share in shares]
        watches = [base.watch for base in bases]
        while shares:
            shares.pop().release()
        self._watches += [watch for watch, base in zip(watches, bases, strict=True) if base.closed]

    # --- for views ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _view(self, view_id: str, side: Side) -> Iterator[HFView]:
        view = HFView(view_id, self)
        self._require().views[view] = side
        del side
        try:
            yield view
        finally:
            view.close()

    def _run(self, view: HFView, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        handled = sys.exception()
        try:
            return self._bound_run(view, work, args)
        except BaseException as error:
            forget_frames(error, handled)  # the frames of a failed forward pass hold on to weights
            raise

    def _bound_run(self, view: HFView, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        import torch

        side = self._side(view)
        with side.base.lock:
            self._require()  # it may have been closed while we waited
            quiet = no_warnings() if side.runner is side.base.peft_model else nullcontext()
            with quiet, side.base.switch.bound(side.state), torch.inference_mode():
                return work(Engine(side.runner, side.tokenizer, side.base.forward, side.recall), *args)

    def _raw_model(self, view: HFView) -> Any:
        side = self._side(view)
        with side.base.lock:
            self._require()  # it may have been closed while we waited
            side.base.switch.rest(side.state)
        return side.raw

    def _tokenizer(self, view: HFView) -> Any:
        return self._side(view).tokenizer

    def _side(self, view: HFView) -> Side:
        side = self._require().views.get(view)
        if side is None:  # it was closed between the call and here
            raise view._closed_error()
        return side

    def _view_closed(self, view: HFView) -> None:
        side = None if self._loaded is None else self._loaded.views.pop(view, None)
        if side is not None and side.state.overlay is not None:
            with side.base.lock:
                side.base.switch.drop(side.state.overlay)

    def _require(self) -> Loaded:
        if self._loaded is None:
            raise BackendClosedError(
                f"the backend of {self._spec} was used after it was closed, by eviction or at the end of the session."
                " Ask for it again with sway_backend(spec)."
            )
        return self._loaded

    def _tuned(self, what: str) -> Side:
        side = self._require().tuned
        if side is None:
            raise NoAdapterError(
                f"{what}() was asked of {self._spec}, whose spec has no adapter. Add 'adapter': <folder> to the spec,"
                " or use as_base()."
            )
        return side

    def _adapter(self, what: str) -> Adapter:
        adapter = self._require().adapter
        if adapter is None:
            raise BackendUseError(
                f"{what} needs a LoRA adapter that only adds to its base; {self._spec.finetuned!r} is a whole model,"
                " with no adapter to scale or to replace. Use as_finetuned()."
            )
        return adapter
