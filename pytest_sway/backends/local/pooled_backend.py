"""`PooledBackend`: a base in this process, shared with other backends, and an adapter on it."""

from __future__ import annotations

import math
import sys
import threading
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pytest_sway.backends.contract import HintsAtViews, opens_view, preflight
from pytest_sway.backends.local.pooled_view import PooledView
from pytest_sway.backends.view import closed_error, null_id
from pytest_sway.errors import BackendUseError, NoAdapterError
from pytest_sway.spec.tasks import is_causal
from pytest_sway.system.garbage import forget_frames
from pytest_sway.system.locking import close_all
from pytest_sway.system.wording import summarised

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from pytest_sway.backends.checkpoints.plan import Plan
    from pytest_sway.backends.local.pool import PoolLease
    from pytest_sway.backends.local.pooled_builder import Recorded
    from pytest_sway.backends.local.tokenizer_copies import RustRecord
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


class Closable(Protocol):
    """What a backend needs of its sides."""

    def close(self) -> None:
        """Release the models that it computes with."""
        ...


S = TypeVar("S", bound=Closable)
V = TypeVar("V", bound=PooledView)


@dataclass(slots=True, eq=False)
class Handed(Generic[S]):
    """What an open view has given to its test.

    Attributes:
        side: The view's side.
        own: Whether the side was made for this view alone.
        model: The test's own model; ``None`` until it is asked for.
        tokenizer: The test's own tokenizer; ``None`` until it is asked for.
    """

    side: S
    own: bool
    model: Any = None
    tokenizer: Any = None


@dataclass(slots=True, eq=False)
class Loaded(Generic[S]):
    """All that a backend has in memory. A closed backend no longer refers to it.

    Attributes:
        shares: The claims on its models, in the order of the plan's.
        base: The base's side.
        tuned: The fine-tuned side, if there is one.
        adapter: The adapter, if there is one.
        contents: The record that detects writes to the adapter's memory.
        rust: The record of a tokenizer that the adapter brings.
        views: What each open view has given to its test.
    """

    shares: list[PoolLease[Any]]
    base: S
    tuned: S | None = None
    adapter: Any = None
    contents: Recorded | None = None
    rust: RustRecord | None = None
    views: dict[PooledView, Handed[S]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class PooledBackend(HintsAtViews, ABC, Generic[S, V]):
    """A model with an adapter, or with a fine-tuned model beside it.

    Any number of views may be open at once, in any number of threads. Each computes on its own models.

    Args:
        plan: The plan that it was built from.
        loaded: What was loaded for it.
        withdraw: Called with a changed base, so that no other backend gets it.
    """

    safe_for_concurrent_views = True
    closes_again = True
    _shares_tokenizers = False
    """Whether adapters on a base share equal tokenizers that they bring."""

    def __init__(self, plan: Plan, loaded: Loaded[S], withdraw: Callable[[Any], None]) -> None:
        self._spec, self._key = plan.spec, plan.key  # not the plan, which has the names of all tensors
        self._roles = ["merged model: " if model.merged else "fine-tuned model: " for model in plan.models[1:]]
        self._loaded: Loaded[S] | None = loaded
        self._close_lock = threading.RLock()
        self._closing: list[Loaded[S]] = []
        self._shares = loaded.shares[::-1]  # a merged base goes before the base that it claims
        self._withdraw = withdraw
        self._watches: list[Any] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}{'' if self._loaded else ', closed'}>"

    def __str__(self) -> str:
        return str(self._spec)

    @property
    def spec(self) -> ModelSpec:
        """The spec that it was built from, with the device and dtype that were used."""
        return self._spec

    # --- views --------------------------------------------------------------------------------------------------------

    @opens_view
    def as_base(self) -> Iterator[V]:
        """Open a view on the base."""
        with self._view("base", self._require().base) as view:
            yield view

    @opens_view
    def as_finetuned(self) -> Iterator[V]:
        """Open a view on the base with its adapter, or on the fine-tuned model.

        Raises:
            NoAdapterError: The spec has neither.
        """
        with self._view("ft", self._tuned("as_finetuned")) as view:
            yield view

    @opens_view
    def as_scaled_adapter(self, lam: float) -> Iterator[V]:
        """Open a view in which the LoRA terms are multiplied by ``lam``: 1 is the adapter.

        An adapter's other parts, such as DoRA's magnitudes or ``modules_to_save``, stay as they are. Without such
        parts, 0 is what the adapter is put on. Of several adapters, this is about the last.

        Raises:
            NoAdapterError: The spec has no adapter.
            BackendUseError: The adapter is not LoRA, or changes the base's own weights.
        """
        asked, view_id = "as_scaled_adapter", f"scaled_{lam:.2f}"
        with self._view(view_id, self._scaled(self._tuned(asked), self._adapter(asked), lam), own=True) as view:
            yield view

    @opens_view
    def as_null_adapter(self, seed: int, *, init_scale: float = 0.02, rank_scale: float = 1.0) -> Iterator[V]:
        """Open a view with noise in place of the LoRA matrices, each from ``N(0, init_scale**2 * rank_scale)``.

        The variance of a product of rank r is proportional to r. So this stands for an adapter of ``rank_scale`` times
        the rank. Of several adapters, this is about the last.

        Args:
            seed: The seed of the noise. For kind ``hf``, equal seeds give dlm-sway's noise.
            init_scale: The standard deviation.
            rank_scale: The rank that the noise stands for, as a multiple of the adapter's.

        Raises:
            ValueError: ``rank_scale`` is not positive and finite.
            NoAdapterError: The spec has no adapter.
            BackendUseError: The adapter is not LoRA, or changes the base's own weights.
        """
        asked, view_id, scale = "as_null_adapter", null_id(seed, rank_scale), init_scale * math.sqrt(rank_scale)
        with self._view(view_id, self._null(self._tuned(asked), self._adapter(asked), seed, scale), own=True) as view:
            yield view

    # --- for the cache, the hygiene and dlm-sway ----------------------------------------------------------------------

    def cache_identity(self) -> str:
        """Return an identity, equal for equal bases and adapters or fine-tuned models; for ``hf``, dlm-sway's."""
        spec = self._spec
        tuned = [*([] if spec.finetuned is None else [spec.finetuned]), *map(str, spec.adapters)]
        task = "" if is_causal(spec.task) else f":{spec.task}"
        return f"{spec.kind}:{spec.base}:{' + '.join(tuned) or None}{task}"

    def preflight_finite_check(self) -> tuple[bool, str]:
        """Ask each side for something small; return ``(True, "")``, or ``(False, reason)``."""
        tuned = {} if self._require().tuned is None else {"ft": self.as_finetuned}
        return preflight({"base": self.as_base} | tuned, lambda view, label: view._not_finite(label))

    def sizes(self) -> Mapping[Hashable, int]:
        """Return the bytes of each part in memory, keyed as in the plan's sizes."""
        loaded = self._require()
        sizes: dict[Hashable, int] = {share.key: share.value.nbytes for share in loaded.shares}
        if loaded.adapter is not None:
            sizes["adapter", *self._key] = loaded.adapter.nbytes
        return sizes

    def changes(self) -> list[str]:
        """Return one line for each change since the load; none if nothing has changed.

        A test's own models and tokenizers do not count; what they share with others does. A changed base is given to no
        other backend. Process-wide patches are undone.

        Raises:
            BackendClosedError: It was closed.
        """
        loaded = self._require()
        brought = [] if loaded.rust is None else loaded.rust.changes()
        lines = brought + ([] if loaded.contents is None else loaded.contents.changes())
        for whose, share in zip(["", *self._roles], loaded.shares, strict=True):
            found = share.value.changes()
            if found or (brought and self._shares_tokenizers):
                self._withdraw(share.value)
            lines += [whose + line for line in (*found, *self._put_back(share.value)) if line not in lines]
        return summarised(lines)

    def close(self) -> None:
        """Release the adapter and the claim on the base, which its last user frees.

        Closing twice is harmless. After an interrupt, it finishes what the first close has left.
        """
        with self._close_lock:
            if self._loaded is not None:
                self._closing, self._loaded = [self._loaded], None
            close_all(self._closing, self._let_go)
            # The sides refer to the model, which must be gone before its base is closed.
            close_all(self._shares, self._release)

    def _release(self, share: PoolLease[Any]) -> None:
        base = share.value
        share.release()
        if base.closed:
            self._watches += self._watches_of(base)

    def _let_go(self, loaded: Loaded[S]) -> None:
        for handed in list(loaded.views.values()):
            if handed.own:
                handed.side.close()
        if loaded.adapter is not None:
            if loaded.tuned is not None:
                loaded.tuned.close()
            self._watches = self._watches_of(loaded.adapter)

    # --- for views ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _view(self, view_id: str, side: S, *, own: bool = False) -> Iterator[V]:
        with self._new_view(view_id) as view:
            self._require().views[view] = Handed(side, own)
            del side
            yield view

    def _run(self, view: PooledView, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        handled = sys.exception()
        try:
            return self._computed(self._handed(view).side, work, args)
        except BaseException as error:
            forget_frames(error, handled)  # the frames of a failed forward pass hold weights
            raise

    def _model(self, view: PooledView) -> Any:
        handed = self._handed(view)
        with self._require().lock:
            if handed.model is None:
                handed.model = self._new_model(handed.side)
            return handed.model

    def _tokenizer(self, view: PooledView) -> Any:
        handed = self._handed(view)
        with self._require().lock:
            if handed.tokenizer is None:
                handed.tokenizer = self._new_tokenizer(handed.side)
            return handed.tokenizer

    def _handed(self, view: PooledView) -> Handed[S]:
        handed = self._require().views.get(view)
        if handed is None:  # it was closed during the call
            raise view._closed_error()
        return handed

    def _view_closed(self, view: PooledView) -> None:
        handed = None if self._loaded is None else self._loaded.views.pop(view, None)
        if handed is not None and handed.own:
            handed.side.close()

    def _require(self) -> Loaded[S]:
        if self._loaded is None:
            raise closed_error(f"the backend of {self._spec}")
        return self._loaded

    def _tuned(self, what: str) -> S:
        side = self._require().tuned
        if side is None:
            raise NoAdapterError(
                f"{what}() needs an adapter, but the spec of {self._spec} has none. Add 'adapter': <folder> to the"
                " spec, or use as_base()."
            )
        return side

    def _adapter(self, what: str) -> Any:
        adapter = self._require().adapter
        if adapter is None:
            raise BackendUseError(
                f"{what} needs a LoRA adapter that only adds to its base, but {self._spec.finetuned!r} is a whole"
                " model, without an adapter to scale or to replace. Use as_finetuned()."
            )
        return adapter

    # --- implemented by each kind -------------------------------------------------------------------------------------

    @abstractmethod
    def _new_view(self, view_id: str) -> V: ...

    @abstractmethod
    def _computed(self, side: S, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return ``work(engine, *args)`` with a side's engine."""

    @abstractmethod
    def _new_model(self, side: S) -> Any:
        """Return a model that a test may change in any way."""

    @abstractmethod
    def _new_tokenizer(self, side: S) -> Any:
        """Return a tokenizer with settings of its own."""

    @abstractmethod
    def _scaled(self, side: S, adapter: Any, lam: float) -> S:
        """Return a side in which an adapter's LoRA terms are multiplied by ``lam``."""

    @abstractmethod
    def _null(self, side: S, adapter: Any, seed: int, scale: float) -> S:
        """Return a side with noise of this standard deviation in place of an adapter's LoRA matrices."""

    @abstractmethod
    def _watches_of(self, what: Any) -> list[Any]:
        """Return objects that tell whether the memory of a base or an adapter is gone."""

    def _put_back(self, base: Any) -> list[str]:  # noqa: ARG002 # for kinds whose libraries can be patched
        """Undo process-wide patches; return one line for each."""
        return []
