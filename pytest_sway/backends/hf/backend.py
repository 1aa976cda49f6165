"""`HFBackend`: a base and an adapter on it, as two views on one set of weights."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.contract import preflight
from pytest_sway.backends.hf.adapters import overlays
from pytest_sway.backends.hf.hygiene.weights_watch import WeightsWatch, find_leak, measured
from pytest_sway.backends.hf.loading.libraries import forget_layers
from pytest_sway.backends.hf.view import HFView
from pytest_sway.backends.libraries.process import no_warnings
from pytest_sway.backends.local.leaks import Leak
from pytest_sway.backends.local.tokenizer_copies import copied
from pytest_sway.errors import BackendClosedError, BackendUseError, NoAdapterError
from pytest_sway.spec.identity import base_key, resolved_key
from pytest_sway.system.frames import forget_frames
from pytest_sway.system.wording import summarised

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from pytest_sway.backends.hf.hygiene.contents import ContentsRecord
    from pytest_sway.backends.hf.model.adapter import Adapter
    from pytest_sway.backends.hf.model.base import LoadedBase
    from pytest_sway.backends.hf.model.bound_model import Side
    from pytest_sway.backends.local.pool import Share
    from pytest_sway.backends.local.tokenizer_copies import RustRecord
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


@dataclass(slots=True, eq=False)
class _Handed:
    """What an open view has handed to its test.

    Attributes:
        side: The view's side.
        own: Whether the side is this view's alone.
        model: The test's own model; ``None`` until it is asked for.
        tokenizer: The test's own tokenizer; ``None`` until it is asked for.
    """

    side: Side
    own: bool
    model: Any = None
    tokenizer: Any = None


@dataclass(slots=True, eq=False)
class Loaded:
    """All that a backend has in memory; what is left of a closed backend does not refer to it.

    Attributes:
        shares: The claims on the bases that it uses: the base, and after it a whole fine-tuned model.
        base: The base's side.
        tuned: The tuned side, if there is one.
        adapter: The adapter, if there is one.
        contents: What is in the adapter's memory, as far as that is exposed.
        rust: The record of a tokenizer that the adapter brings.
        views: What the open views have handed out.
    """

    shares: list[Share[LoadedBase]]
    base: Side
    tuned: Side | None = None
    adapter: Adapter | None = None
    contents: ContentsRecord | None = None
    rust: RustRecord | None = None
    views: dict[HFView, _Handed] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class HFBackend:
    """A Hugging Face model with a PEFT adapter, or beside what it was fine-tuned to; made by `HFBuilder.build`.

    Any number of views may be open at once, in any number of threads: each computes on models of its own.

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
        with self._view(f"scaled_{lam:.2f}", overlays.scaled(side, adapter, lam), own=True) as view:
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
        view_id = f"null_{seed}" if rank_scale == 1.0 else f"null_{seed}_rank{rank_scale:.2f}"
        with self._view(view_id, overlays.null(side, adapter, seed, init_scale, rank_scale), own=True) as view:
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
        sizes: dict[Hashable, int] = {base_key(share.value.spec): share.value.nbytes for share in loaded.shares}
        if loaded.adapter is not None:
            sizes["adapter", *resolved_key(self._spec)] = measured(loaded.adapter.own.values())
        return sizes

    def changes(self) -> list[str]:
        """Return one line for each thing that is no longer as it was after the load; empty when nothing is.

        A test's own models and tokenizers do not count; what they share with others does. A base of which that was
        changed is handed out to nobody else. What was patched for the whole process is put back.

        Raises:
            BackendClosedError: It was closed.
        """
        loaded = self._require()
        brought = [] if loaded.rust is None else loaded.rust.changes()
        lines = brought + (
            [] if loaded.contents is None else [f"adapter: {line}" for line in loaded.contents.changes()]
        )
        for i, share in enumerate(loaded.shares):
            base = share.value
            found = base.changes()
            if found or brought:
                self._withdraw(base)
            if patches := base.patches():
                base.undo_patches()
            whose = "fine-tuned model: " if i and self._spec.finetuned else ""
            lines += [whose + line for line in (*found, *patches) if line not in lines]
        return summarised(lines)

    def close(self) -> None:
        """Let go of the adapter and give the base back; the last to use it frees it. Closing twice is harmless."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        shares = loaded.shares
        for side in (loaded.tuned, *(handed.side for handed in list(loaded.views.values()) if handed.own)):
            if side is not None and not (self._spec.finetuned and side is loaded.tuned):
                side.close()
        if loaded.adapter is not None:
            self._watches = loaded.adapter.pristine.watches.all()
            forget_layers()
        del loaded  # its sides refer to the model, which has to be gone when its base is closed
        self._release(shares)

    def leak(self) -> Leak | None:
        """Return what its close should have freed and did not; ``None`` if all is gone, or before the close."""
        return find_leak(self._watches)

    def _release(self, shares: list[Share[LoadedBase]]) -> None:
        bases = [share.value for share in shares]
        watches = [base.watches for base in bases]
        while shares:
            shares.pop().release()
        self._watches += [watch for its, base in zip(watches, bases, strict=True) if base.closed for watch in its.all()]

    # --- for views ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _view(self, view_id: str, side: Side, *, own: bool = False) -> Iterator[HFView]:
        view = HFView(view_id, self)
        self._require().views[view] = _Handed(side, own)
        del side
        try:
            yield view
        finally:
            view.close()

    def _run(self, view: HFView, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        handled = sys.exception()
        try:
            return self._computed(view, work, args)
        except BaseException as error:
            forget_frames(error, handled)  # the frames of a failed forward pass hold on to weights
            raise

    def _computed(self, view: HFView, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        import torch

        with self._handed(view).side.engine() as engine:
            quiet = nullcontext() if engine.model is engine.forward.model else no_warnings()
            with quiet, torch.inference_mode():
                return work(engine, *args)

    def _raw_model(self, view: HFView) -> Any:
        handed = self._handed(view)
        with self._require().lock:
            if handed.model is None:
                handed.model = handed.side.tree()
            return handed.model

    def _tokenizer(self, view: HFView) -> Any:
        handed = self._handed(view)
        with self._require().lock:
            if handed.tokenizer is None:
                handed.tokenizer = copied(handed.side.tokenizer)
            return handed.tokenizer

    def _handed(self, view: HFView) -> _Handed:
        handed = self._require().views.get(view)
        if handed is None:  # it was closed between the call and here
            raise view._closed_error()
        return handed

    def _view_closed(self, view: HFView) -> None:
        handed = None if self._loaded is None else self._loaded.views.pop(view, None)
        if handed is not None and handed.own:
            handed.side.close()

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
