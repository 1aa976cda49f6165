"""`Build`, the base class of builders, and checks on the backends that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dis import opmap
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypeVar

from pytest_sway.backends.checkpoints.plan import Plan
from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.errors import BackendLoadError
from pytest_sway.protocols import BatchView, RawView, View
from pytest_sway.spec.identity import with_adapter
from pytest_sway.spec.model_spec import ModelSpec
from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType, TracebackType

    from pytest_sway.protocols import DifferentialBackend, TokenDist


_PROMPT: Final = "hello"
_TOP_K: Final = 8
_OF_VIEWS: Final = frozenset({*dir(View), *dir(BatchView), *dir(RawView)})

P = ParamSpec("P")
V = TypeVar("V")


__tracebackhide__ = True


def preflight(
    sides: Mapping[str, Callable[[], AbstractContextManager[V]]],
    ask: Callable[[V, str], str] | None = None,
) -> tuple[bool, str]:
    """Ask each side for something small.

    Args:
        sides: Functions that open a view on each side, by the side's name in reports.
        ask: Asks a view, and returns a sentence with its label on what is not finite; by default, for the next tokens.

    Returns:
        ``(True, "")``, or ``(False, reason)`` if a side raises or gives a number that is not finite.
    """
    reasons = []
    for label, opened in sides.items():
        try:
            with opened() as view:
                reasons.append(ask_next_token(view, label) if ask is None else ask(view, label))
        except Exception as error:  # whatever went wrong is the answer
            reasons.append(f"the {label} view raised {type(error).__name__}: {redacted(str(error))}")
    return not any(reasons), "; ".join(filter(None, reasons))


def ask_next_token(view: Any, label: str) -> str:
    """Return a sentence on what is not finite in the distribution of a view's next token."""
    return not_finite(label, view.next_token_dist(_PROMPT, top_k=_TOP_K))


def not_finite(label: str, dist: TokenDist) -> str:
    """Return a sentence on the numbers of a distribution that are not finite; an empty text if all are."""
    bad = sum(not math.isfinite(logprob) for logprob in dist.logprobs)
    if bad:
        return f"the {label} view gave {bad} of {dist.logprobs.size} non-finite log-probabilities"
    if dist.tail_logprob is not None and not math.isfinite(dist.tail_logprob):
        return f"the {label} view gave a non-finite tail_logprob, {dist.tail_logprob}"
    return ""


def opens_view(opened: Callable[P, Iterator[V]]) -> Callable[P, AbstractContextManager[V]]:
    """Decorate like `contextlib.contextmanager`; using the result without ``with`` raises an error that says so."""

    @wraps(opened)
    def opening(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[V]:
        return _Opening(opened(*args, **kwargs), opened.__name__)

    return opening


class _Opening(AbstractContextManager[V]):
    """A view that is not open yet.

    Args:
        steps: Opens the view, yields it and closes it.
        method: The name of the backend's method that made it.
    """

    def __init__(self, steps: Iterator[V], method: str) -> None:
        self._steps = steps
        self._manager = contextmanager(lambda: steps)()
        self._method = method

    def __enter__(self) -> V:
        # The manager's own method would be what pytest shows of an error: it is code of contextlib.
        for view in self._steps:
            return view
        raise RuntimeError(f"{self._method}() was entered before: call it again for another view")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> Any:
        return self._manager.__exit__(kind, error, tb)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"{self._method}() opens a view in a `with` block: write `with backend.{self._method}(...) as"
                f" view: view.{name}`."
            )


class HintsAtViews:
    """A backend whose `AttributeError` points to its views if you ask it for a view's attribute."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name in _OF_VIEWS:
                message += (
                    ". A backend has two views, of the base and of the fine-tuned model. Use one of them: `with"
                    f" backend.as_finetuned() as view: view.{name}`."
                )
            elif name.startswith("as_"):
                message += f". It has {', '.join(each for each in dir(type(self)) if each.startswith('as_'))}."
            raise AttributeError(message)

        def __enter__(self) -> NoReturn:
            raise TypeError(
                "a backend needs no `with`: it is released after the test. Open one of its views: `with"
                " backend.as_finetuned() as view`."
            )

        def __exit__(self, *_: object) -> None:
            """Is never called."""


class Build:
    """Makes backends: `resolve` the spec, `check` it once, then `pin` and `build` from the plan.

    Override `build`, and every method that you can answer better: the defaults know nothing before a load.
    """

    def __call__(self, spec: ModelSpec, *, adapter_path: Path | None = None) -> Any:
        """Load what ``spec`` describes.

        Args:
            spec: What to load.
            adapter_path: An adapter that replaces the spec's own.
        """
        return self.build(self.check(self.resolve(with_adapter(spec, adapter_path))))

    def resolve(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` as it will be loaded: on a device, in a dtype, from folders on this machine."""
        return self.located(self.placed(spec))

    def located(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with its adapter as a folder and its base named, where a hub or the adapter says them.

        Raises:
            SwayError: They cannot be found.
        """
        return spec

    @staticmethod
    def placed(spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with the device and dtype that ``auto`` stands for on this machine."""
        return spec

    def check(self, spec: ModelSpec) -> Plan:
        """Return the plan for a resolved spec, before any model is evicted or loaded for it.

        Parts that backends share, such as a base, have equal keys in the plan's sizes and count once.

        Raises:
            SwayError: The spec cannot be loaded.
        """
        return Plan.of(spec)

    def pin(self, plan: Plan) -> AbstractContextManager[None]:  # noqa: ARG002 # for those who override it
        """Keep the parts that a plan shares from being closed while models are evicted for it."""
        return nullcontext()

    def build(self, plan: Plan) -> Any:
        """Load what a plan describes, except for shared parts that are loaded already.

        Raises:
            SwayError: It cannot be loaded; the message says why and what to do.
        """
        raise NotImplementedError(f"{type(self).__name__} must override build() to load {plan.spec}")

    def measure(self, backend: Any) -> Mapping[Hashable, int] | None:
        """Return the bytes of each part of a loaded backend, keyed as in a plan's sizes; ``None`` if unknown."""
        sizes = getattr(backend, "sizes", None)
        found = sizes() if callable(sizes) else None
        # Numbers of numpy are no JSON.
        return None if found is None else {part: int(size) for part, size in found.items()}

    def exhausted(self, error: Exception) -> bool:
        """Return whether a load failed for lack of memory, so that it is tried again after an eviction."""
        return out_of_memory(error)


def closers_of(built: Iterable[Any]) -> list[Callable[[], object]]:
    """Return the ``close`` methods of backends; one without is skipped."""
    closes = (getattr(backend, "close", None) for backend in built)
    return [close for close in closes if callable(close)]


def closes_again(close: Callable[[], object], interrupt: BaseException) -> bool:
    """Return whether to call a ``close`` method again after an interrupt of its call.

    Backends in this process finish what their close has left. A user's close is called once, since one that hung until
    a timeout could hang again, without a timeout. But it is not yet called if the interrupt came before its first line.
    """
    if getattr(type(getattr(close, "__self__", None)), "closes_again", False):  # not of what it wraps
        return True
    code = getattr(getattr(close, "__func__", close), "__code__", None)
    places = [at for frame, at in _places(interrupt) if frame.f_code is code]
    return code is not None and all(code.co_code[at] == opmap.get("RESUME") for at in places[:1])


def _places(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames of an error's traceback, and the bytecode in each at which it came."""
    at = error.__traceback__
    while at is not None:
        yield at.tb_frame, at.tb_lasti
        at = at.tb_next


def require_differential(backend: Any, made_by: str) -> DifferentialBackend:
    """Return ``backend`` if it is a differential backend; close it otherwise.

    Args:
        backend: What a user's code made.
        made_by: The name of that code, for the message.

    Raises:
        BackendLoadError: It lacks a method.
    """
    missing = [name for name in ("as_base", "as_finetuned") if not callable(getattr(backend, name, None))]
    if missing:
        with suppress(Exception):  # the error below matters more
            for close in closers_of([backend]):
                close()
        raise BackendLoadError(
            f"{made_by} made a {type(backend).__name__}, which is no differential backend: it lacks"
            f" {' and '.join(missing)}."
        )
    checked: DifferentialBackend = backend
    return checked
