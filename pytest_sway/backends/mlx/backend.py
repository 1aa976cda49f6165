"""`MLXBackend`: a base and an adapter on it, as two views on one set of weights."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.contents import summarised
from pytest_sway.backends.mlx import sides
from pytest_sway.backends.mlx.base import encoder_of
from pytest_sway.backends.mlx.inspection import ArraysRecord
from pytest_sway.backends.mlx.memory import WeightsWatch, find_leak
from pytest_sway.backends.mlx.views import MLXView
from pytest_sway.backends.preflight import not_finite
from pytest_sway.errors import BackendClosedError, BackendUseError, NoAdapterError
from pytest_sway.frames import forget_frames
from pytest_sway.spec import base_key, resolved_key

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from pytest_sway.backends.hf.memory import Leak
    from pytest_sway.backends.mlx.adapters import Adapter
    from pytest_sway.backends.mlx.base import LoadedBase
    from pytest_sway.backends.mlx.sides import Side
    from pytest_sway.backends.shared import Share
    from pytest_sway.spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_PREFLIGHT_PROMPT = "hello"
_PREFLIGHT_TOP_K = 8


@dataclass(slots=True, eq=False)
class Loaded:
    """All that a backend has in memory; what is left of a closed backend does not refer to it.

    Attributes:
        shares: The claims on the bases that it uses: one, or two where the fine-tuned side is a whole model.
        base: The base's side.
        tuned: The tuned side, if there is one.
        adapter: The adapter, if there is one.
        views: The sides of the open views.
    """

    shares: list[Share[LoadedBase]]
    base: Side
    tuned: Side | None
    adapter: Adapter | None = None
    views: dict[MLXView, Side] = field(default_factory=dict)


class MLXBackend:
    """A model of mlx-lm with an adapter, or beside what it was fine-tuned to; made by `MLXBuilder.build`.

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
        adapter = loaded.adapter
        self._record = None if adapter is None else ArraysRecord("adapter weight", adapter.arrays())
        self._tokenizer_record = TokenizerRecord(encoder_of(loaded.base.tokenizer))
        self._watches: list[WeightsWatch] = []

    def __repr__(self) -> str:
        return f"<MLXBackend {self._spec}{'' if self._loaded else ', closed'}>"

    @property
    def spec(self) -> ModelSpec:
        """The spec that it was built from, with the device and dtype that were used."""
        return self._spec

    # --- views --------------------------------------------------------------------------------------------------------

    @contextmanager
    def as_base(self) -> Iterator[MLXView]:
        """Open a view on the base."""
        with self._view("base", self._require().base) as view:
            yield view

    @contextmanager
    def as_finetuned(self) -> Iterator[MLXView]:
        """Open a view on the base with its adapter, or on the fine-tuned model.

        Raises:
            NoAdapterError: The spec has neither.
        """
        with self._view("ft", self._tuned("as_finetuned")) as view:
            yield view

    @contextmanager
    def as_scaled_adapter(self, lam: float) -> Iterator[MLXView]:
        """Open a view in which the LoRA terms count ``lam`` times: 0 is the base, 1 the adapter.

        DoRA's magnitudes stay as they are.

        Raises:
            NoAdapterError: The spec has no adapter.
            BackendUseError: What it has is a full fine-tune.
        """
        side = self._tuned("as_scaled_adapter")
        overlay = sides.scaled(self._adapter("as_scaled_adapter"), lam)
        with self._view(f"scaled_{lam:.2f}", side.with_overlay(overlay)) as view:
            yield view

    @contextmanager
    def as_null_adapter(self, seed: int, *, init_scale: float = 0.02, rank_scale: float = 1.0) -> Iterator[MLXView]:
        """Open a view with noise in place of the LoRA matrices, each from ``N(0, init_scale**2 * rank_scale)``.

        Args:
            seed: Where the noise starts. It is MLX's, and not that of kind ``hf``.
            init_scale: Standard deviation.
            rank_scale: The rank that the noise stands for, as a multiple of the adapter's.

        Raises:
            ValueError: ``rank_scale`` is not positive and finite.
            NoAdapterError: The spec has no adapter.
            BackendUseError: What it has is a full fine-tune.
        """
        side = self._tuned("as_null_adapter")
        overlay = sides.null(self._adapter("as_null_adapter"), seed, init_scale, rank_scale)
        view_id = f"null_{seed}" if rank_scale == 1.0 else f"null_{seed}_rank{rank_scale:.2f}"
        with self._view(view_id, side.with_overlay(overlay)) as view:
            yield view

    # --- for the cache, the hygiene and dlm-sway ----------------------------------------------------------------------

    def cache_identity(self) -> str:
        """Return what is equal for equal bases and adapters, or fine-tuned models."""
        return f"mlx:{self._spec.base}:{self._spec.finetuned or self._spec.adapter}"

    def preflight_finite_check(self) -> tuple[bool, str]:
        """Score one prompt on each side; return ``(True, "")``, or ``(False, reason)``."""
        try:
            with self.as_base() as base:
                found = {"base": base.next_token_dist(_PREFLIGHT_PROMPT, top_k=_PREFLIGHT_TOP_K)}
            if self._require().tuned is not None:
                with self.as_finetuned() as tuned:
                    found["ft"] = tuned.next_token_dist(_PREFLIGHT_PROMPT, top_k=_PREFLIGHT_TOP_K)
        except Exception as error:  # the check reports whatever went wrong
            return False, f"preflight forward pass raised {type(error).__name__}: {error}"
        reasons = [reason for label, dist in found.items() if (reason := not_finite(label, dist))]
        return not reasons, "; ".join(reasons)

    def sizes(self) -> Mapping[Hashable, int]:
        """Return the bytes that each part takes in memory, keyed as in `MLXBuilder.estimate`."""
        loaded = self._require()
        sizes: dict[Hashable, int] = {base_key(share.value.spec): share.value.nbytes for share in loaded.shares}
        if loaded.adapter is not None:
            arrays = loaded.adapter.arrays().values()
            sizes["adapter", *resolved_key(self._spec)] = sum(array.nbytes for array in arrays)
        return sizes

    def changes(self) -> list[str]:
        """Return one line for each thing that is no longer as it was after the load; empty when nothing is.

        A shared base that was changed is handed out to nobody else.

        Raises:
            BackendClosedError: It was closed.
        """
        loaded = self._require()
        lines = self._tokenizer_record.changes()
        for i, share in enumerate(loaded.shares):
            base = share.value
            with base.lock:
                found = base.changes()
                if i == 0 and loaded.adapter is not None and self._record is not None:
                    with base.switch.bound(()):
                        lines += self._record.changes(loaded.adapter.arrays())
            if found:
                self._withdraw(base)
            lines += [("fine-tuned model: " if i else "") + line for line in found if line not in lines]
        return summarised(lines)

    def close(self) -> None:
        """Let go of the adapter and give the base back; the last to use it frees it. Closing twice is harmless."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        self._record = None
        shares = loaded.shares
        try:
            self._take_off(loaded)
        finally:
            del loaded  # its sides refer to the model, which has to be gone when its base is closed
            self._release(shares)

    def leak(self) -> Leak | None:
        """Return what its close should have freed and did not; ``None`` if all is gone, or before the close."""
        return find_leak(self._watches)

    def _take_off(self, loaded: Loaded) -> None:
        for side in (loaded.tuned, *loaded.views.values()):
            self._leave(side)
        if loaded.adapter is not None:
            self._watches.append(WeightsWatch(loaded.adapter.layers.values(), loaded.adapter.arrays().values()))

    def _release(self, shares: list[Share[LoadedBase]]) -> None:
        bases = [share.value for share in shares]
        while shares:
            shares.pop().release()
        self._watches += [base.watch for base in bases if base.closed]

    # --- for views ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _view(self, view_id: str, side: Side) -> Iterator[MLXView]:
        view = MLXView(view_id, self)
        self._require().views[view] = side
        del side
        try:
            yield view
        finally:
            view.close()

    def _run(self, view: MLXView, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        handled = sys.exception()
        try:
            return self._bound_run(view, work, args)
        except BaseException as error:
            forget_frames(error, handled)  # the frames of a failed forward pass hold on to weights
            raise

    def _bound_run(self, view: MLXView, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        import mlx.core as mx

        side = self._side(view)
        with side.base.lock:
            self._require()  # it may have been closed while we waited
            with side.base.switch.bound(side.state), mx.stream(side.base.device):
                return work(side.engine(), *args)

    def _raw_model(self, view: MLXView) -> Any:
        side = self._side(view)
        with side.base.lock:
            self._require()  # it may have been closed while we waited
            side.base.switch.rest(side.state)
            return side.base.model

    def _tokenizer(self, view: MLXView) -> Any:
        return self._side(view).tokenizer

    def _side(self, view: MLXView) -> Side:
        side = self._require().views.get(view)
        if side is None:  # it was closed between the call and here
            raise view._closed_error()
        return side

    def _view_closed(self, view: MLXView) -> None:
        side = None if self._loaded is None else self._loaded.views.pop(view, None)
        if side is not None and len(side.state) > 1:  # a state of its own, which nobody else can be in
            self._leave(side)

    @staticmethod
    def _leave(side: Side | None) -> None:
        """Take a side's adapter out, if the raw model rests in it."""
        if side is not None and side.state:
            with side.base.lock:
                side.base.switch.leave(side.state[-1])

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
                f"{what} needs a LoRA adapter; {self._spec.finetuned!r} is a whole model, with no adapter to scale or"
                " to replace. Use as_finetuned()."
            )
        return adapter
