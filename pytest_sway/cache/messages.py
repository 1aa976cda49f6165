"""The cache's errors with their messages: what was asked, what was found and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_sway.cache.budget import format_parts, total_bytes
from pytest_sway.cache.entries import State
from pytest_sway.errors import (
    BackendLoadError,
    BackendUseError,
    CacheClosedError,
    CacheDeadlockError,
    CacheFullError,
    FilesChangedError,
    ModelTooLargeError,
)
from pytest_sway.system.redaction import RedactedError, redacted
from pytest_sway.system.wording import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_sway.cache.budget import Budget
    from pytest_sway.cache.entries import Entry, SizeByPart
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


_LONGEST: Final = 2000
"""Characters of a library's message; some quote a whole file."""


def load_failed(error: BaseException, spec: ModelSpec) -> BackendLoadError:
    """Wrap an error of a build that is no `SwayError`; a `RedactedError` names the type that it replaces."""
    adapter = f" with adapter {' and '.join(repr(str(each)) for each in spec.adapters)}" if spec.adapters else ""
    finetuned = "" if spec.finetuned is None else f" with fine-tuned model {spec.finetuned!r}"
    by = f" by {spec.entry_point!r}" if spec.kind == "custom" else ""
    what = str(error) if isinstance(error, RedactedError) else f"{type(error).__name__}: {error}"
    what = what if len(what) <= _LONGEST else f"{what[:_LONGEST]}..."
    return BackendLoadError(
        redacted(f"loading the {spec.kind} backend of base {spec.base!r}{adapter}{finetuned}{by} failed: {what}")
    )


def files_changed(spec: ModelSpec) -> FilesChangedError:
    """The files changed during each try to load them."""
    return FilesChangedError(
        f"the files of {spec} changed during each try to load them, so it is unknown which contents were loaded."
        " Wait until nothing writes to them, or test a copy."
    )


def full(newcomer: Entry, residents: Sequence[Entry], budget: Budget, why: str, remedy: str) -> CacheFullError:
    """The leased entries leave no room for ``newcomer``.

    Args:
        newcomer: The entry to load.
        residents: The resident entries.
        budget: The bounds.
        why: Why no resident can be evicted.
        remedy: What else you can do than release one.
    """
    names = "; ".join(f"{entry.spec} ({entry.occupation})" for entry in residents)
    bound = f"{len(residents)} of at most {budget.max_size} backends"
    if budget.max_bytes is not None:
        size = total_bytes(residents)
        known = "an unknown number of bytes" if size is None else format_bytes(size)
        bound += f" with {known} of at most {format_bytes(budget.max_bytes)}"
    return CacheFullError(
        f"there is no room to load {newcomer.spec}: the cache holds {bound}, and {why}: {names}."
        f" Release one of them first, or {remedy}."
    )


def out_of_memory(spec: ModelSpec, estimate: SizeByPart | None, residents: Sequence[Entry]) -> CacheFullError:
    """Memory ran out during the load, and again after all idle backends were closed."""
    others = [entry for entry in residents if entry.state is not State.LOADING]
    names = "; ".join(f"{entry.spec}, {format_parts(entry.parts)} ({entry.occupation})" for entry in others)
    return CacheFullError(
        f"loading {spec} ({format_parts(estimate)}) ran out of memory on device {spec.device} twice. All idle backends"
        f" were closed before the second try; still loaded: {names or 'nothing'}."
        " Use a smaller dtype or model, or release a backend."
    )


def too_large(spec: ModelSpec, size: int, max_bytes: int) -> ModelTooLargeError:
    """The estimate alone exceeds the byte budget."""
    return ModelTooLargeError(
        f"{spec} takes {format_bytes(size)}, more than the whole budget of {format_bytes(max_bytes)}; nothing was"
        " evicted for it. Raise the budget, or use a smaller dtype or model."
    )


def turned_out_too_large(spec: ModelSpec, size: int, max_bytes: int) -> ModelTooLargeError:
    """The loaded backend exceeds the byte budget, although its estimate did not."""
    return ModelTooLargeError(
        f"{spec} takes {format_bytes(size)} after its load, more than the whole budget of {format_bytes(max_bytes)}."
        " Raise the budget, or use a smaller dtype or model."
    )


def shut_down(when: str) -> CacheClosedError:
    """The cache was shut down; ``when`` says at which point of the request."""
    return CacheClosedError(f"the cache was shut down {when}; it serves no more requests.")


def ended(spec: ModelSpec, owner: str) -> BackendUseError:
    """The owner of the request has ended, while one of its threads still runs."""
    return BackendUseError(
        f"{owner} has ended, but one of its threads still asks for {spec}. Join the thread before the test ends, or ask"
        " in the test that needs the backend."
    )


def load_asks_for_itself(spec: ModelSpec) -> CacheDeadlockError:
    """A load waits for itself, perhaps through other threads."""
    return CacheDeadlockError(
        f"the load of {spec} asks the cache for the same spec, so it would wait for itself forever. A build may ask"
        " for other specs, but not for its own."
    )


def close_asks_for_itself(spec: ModelSpec) -> CacheDeadlockError:
    """A ``close()`` waits for itself."""
    return CacheDeadlockError(
        f"the close() of {spec} asks the cache for the same spec, so it would wait for itself forever."
    )
