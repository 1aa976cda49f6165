"""`MLXBackend`: a base and an adapter on it, as two views on one set of weights."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.contract import preflight
from pytest_sway.backends.local.tokenizer_copies import RustRecord
from pytest_sway.backends.mlx.adapters import overlays
from pytest_sway.backends.mlx.model.base import encoder_of, own_tokenizer_of
from pytest_sway.backends.mlx.model.bound_model import Side
from pytest_sway.backends.mlx.model.placement import computing_on
from pytest_sway.backends.mlx.model.shared_arrays import find_leak
from pytest_sway.backends.mlx.model.trees import own_tree_of
from pytest_sway.backends.mlx.view import MLXView
from pytest_sway.errors import BackendClosedError, BackendUseError, NoAdapterError
from pytest_sway.spec.identity import base_key, resolved_key
from pytest_sway.system.frames import forget_frames
from pytest_sway.system.wording import summarised

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from pytest_sway.backends.local.leaks import Leak
    from pytest_sway.backends.local.pool import Share
    from pytest_sway.backends.mlx.adapters.attach import Adapter
    from pytest_sway.backends.mlx.model.base import LoadedBase
    from pytest_sway.backends.mlx.model.shared_arrays import SharedArrays
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


@dataclass(slots=True, eq=False)
class Opened:
    """An open view.

    Attributes:
        side: What it shows.
        model: The model that its test was handed, once it has asked for one.
        tokenizer: Likewise.
    """

    side: Side
    model: Any = None
    tokenizer: Any = None


@dataclass(slots=True, eq=False)
class Loaded:
    """All that a backend has in memory; what is left of a closed backend does not refer to it.

    Attributes:
        shares: The claims on the bases that it uses: one, or two where the fine-tuned side is a whole model.
        base: The base's side.
        tuned: The tuned side, if there is one.
        adapter: The adapter, if there is one.
        views: The open views.
    """

    shares: list[Share[LoadedBase]]
    base: Side
    tuned: Side | None
    adapter: Adapter | None = None
    views: dict[MLXView, Opened] = field(default_factory=dict)


class MLXBackend:
    """A model of mlx-lm with an adapter, or beside what it was fine-tuned to; made by `MLXBuilder.build`.

    Any number of views may be open at once, in any number of threads: each side has modules of its own.

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
        tuned = loaded.tuned
        own_tokenizer = tuned is not None and tuned.tokenizer is not tuned.base.tokenizer
        self._rust = RustRecord(encoder_of(tuned.tokenizer)) if tuned is not None and own_tokenizer else None
        self._handing_out = threading.Lock()
        self._freed: list[SharedArrays] = []

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
        model = overlays.scaled(self._adapter("as_scaled_adapter"), lam)
        with self._view(f"scaled_{lam:.2f}", replace(side, model=model)) as view:
            del side, model
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
        with computing_on(side.base.device):
            model = overlays.null(self._adapter("as_null_adapter"), seed, init_scale, rank_scale)
        view_id = f"null_{seed}" if rank_scale == 1.0 else f"null_{seed}_rank{rank_scale:.2f}"
        with self._view(view_id, replace(side, model=model)) as view:
            del side, model
            yield view

    # --- for the cache, the hygiene and dlm-sway ----------------------------------------------------------------------

    def cache_identity(self) -> str:
        """Return what is equal for equal bases and adapters, or fine-tuned models."""
        return f"mlx:{self._spec.base}:{self._spec.finetuned or self._spec.adapter}"

    def preflight_finite_check(self) -> tuple[bool, str]:
        """Score one prompt on each side; return ``(True, "")``, or ``(False, reason)``."""
        checked = {"base": self.as_base}
        if self._require().tuned is not None:
            checked["ft"] = self.as_finetuned
        return preflight(checked)

    def sizes(self) -> Mapping[Hashable, int]:
        """Return the bytes that each part takes in memory, keyed as in `MLXBuilder.estimate`."""
        loaded = self._require()
        sizes: dict[Hashable, int] = {base_key(share.value.spec): share.value.shared.nbytes for share in loaded.shares}
        if loaded.adapter is not None:
            sizes["adapter", *resolved_key(self._spec)] = loaded.adapter.shared.nbytes
        return sizes

    def changes(self) -> list[str]:
        """Return one line for each thing that views share and that is no longer as it was; empty when nothing is.

        A shared base that was changed is handed out to nobody else.

        Raises:
            BackendClosedError: It was closed.
        """
        loaded = self._require()
        lines = [] if self._rust is None else self._rust.changes()
        if loaded.adapter is not None:
            lines += [*loaded.adapter.classes.changes(), *loaded.adapter.shared.changes()]
        for i, share in enumerate(loaded.shares):
            found = share.value.changes()
            if found:
                self._withdraw(share.value)
            lines += [("fine-tuned model: " if i else "") + line for line in found if line not in lines]
        return summarised(lines)

    def close(self) -> None:
        """Let go of the adapter and give the base back; the last to use it frees it. Closing twice is harmless."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        self._rust = None
        shares, adapter = loaded.shares, loaded.adapter
        if adapter is not None:
            self._freed.append(adapter.shared)
        del loaded, adapter  # they refer to the models, which have to be gone when the base is closed
        self._release(shares)

    def leak(self) -> Leak | None:
        """Return what its close should have freed and did not; ``None`` if all is gone, or before the close."""
        return find_leak(self._freed)

    def _release(self, shares: list[Share[LoadedBase]]) -> None:
        bases = [share.value for share in shares]
        while shares:
            shares.pop().release()
        self._freed += [base.shared for base in bases if base.closed]

    # --- for views ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _view(self, view_id: str, side: Side) -> Iterator[MLXView]:
        view = MLXView(view_id, self)
        self._require().views[view] = Opened(side)
        del side
        try:
            yield view
        finally:
            view.close()

    def _run(self, view: MLXView, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        handled = sys.exception()
        try:
            return self._computed(self._opened(view).side, work, args)
        except BaseException as error:
            forget_frames(error, handled)  # the frames of a failed forward pass hold on to weights
            raise

    @staticmethod
    def _computed(side: Side, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with computing_on(side.base.device):
            return work(side.engine(), *args)

    def _own_model(self, view: MLXView) -> Any:
        opened = self._opened(view)
        with self._handing_out:
            if opened.model is None:
                adapter = self._require().adapter
                model, copies = own_tree_of(opened.side.model)
                for shared in (opened.side.base.shared, *(() if adapter is None else (adapter.shared,))):
                    shared.handed_out(model, copies)
                opened.model = model
            return opened.model

    def _own_tokenizer(self, view: MLXView) -> Any:
        opened = self._opened(view)
        with self._handing_out:
            if opened.tokenizer is None:
                opened.tokenizer = own_tokenizer_of(opened.side.tokenizer)
            return opened.tokenizer

    def _opened(self, view: MLXView) -> Opened:
        opened = self._require().views.get(view)
        if opened is None:  # it was closed between the call and here
            raise view._closed_error()
        return opened

    def _view_closed(self, view: MLXView) -> None:
        loaded = self._loaded
        if loaded is not None:
            loaded.views.pop(view, None)

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
