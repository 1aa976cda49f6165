"""Why the cache refuses a request, in words: what was asked, what was found and what to do."""

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
"""Characters of what a library says: some repeat a file."""


def load_failed(error: BaseException, spec: ModelSpec) -> BackendLoadError:
    """A build raised something that is no `SwayError`; what stands for it names its type itself."""
    adapter = "" if spec.adapter is None else f" with adapter {str(spec.adapter)!r}"
    finetuned = "" if spec.finetuned is None else f" with fine-tuned model {spec.finetuned!r}"
    by = f" by {spec.entry_point!r}" if spec.kind == "custom" else ""
    what = str(error) if isinstance(error, RedactedError) else f"{type(error).__name__}: {error}"
    what = what if len(what) <= _LONGEST else f"{what[:_LONGEST]}..."
    return BackendLoadError(
        redacted(f"loading the {spec.kind} backend of base {spec.base!r}{adapter}{finetuned}{by} failed: {what}")
    )


def files_changed(spec: ModelSpec) -> FilesChangedError:
    """What was loaded may be neither what was asked for nor what is there now."""
    return FilesChangedError(
        f"the files of {spec} changed each time while they were loaded, so what was loaded is not known. Wait until"
        " nobody writes to them any more, or copy them and test the copy."
    )


def full(newcomer: Entry, residents: Sequence[Entry], budget: Budget, why: str, remedy: str) -> CacheFullError:
    """There is no room for ``newcomer`` beside what is leased.

    Args:
        newcomer: What was to be loaded.
        residents: What is resident.
        budget: What may be.
        why: Why nothing of it can be evicted.
        remedy: What else to do than to release something.
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
    """The memory ran out in the load, and again when all that was idle had been closed."""
    others = [entry for entry in residents if entry.state is not State.LOADING]
    names = "; ".join(f"{entry.spec}, {format_parts(entry.parts)} ({entry.occupation})" for entry in others)
    return CacheFullError(
        f"the memory of {spec.device} ran out twice while {spec} was loaded, which takes {format_parts(estimate)};"
        f" all that was idle was closed before the second try, and {names or 'nothing'} stays loaded."
        " Ask for a smaller dtype or model, or release what is in use."
    )


def too_large(spec: ModelSpec, size: int, max_bytes: int) -> ModelTooLargeError:
    """What is asked for would take more than the whole budget."""
    return ModelTooLargeError(
        f"{spec} takes {format_bytes(size)}, more than the whole budget of {format_bytes(max_bytes)}; nothing was"
        " evicted for it. Raise the budget, or ask for a smaller dtype or model."
    )


def turned_out_too_large(spec: ModelSpec, size: int, max_bytes: int) -> ModelTooLargeError:
    """What was loaded takes more than the whole budget, although its estimate did not."""
    return ModelTooLargeError(
        f"{spec} turned out to take {format_bytes(size)}, more than the whole budget of {format_bytes(max_bytes)}."
        " Raise the budget, or ask for a smaller dtype or model."
    )


def shut_down(when: str) -> CacheClosedError:
    """The cache was shut down, ``when`` being before or during the load of what is asked for."""
    return CacheClosedError(f"the cache was shut down {when}; nothing can be had from it any more.")


def ended(spec: ModelSpec, owner: str) -> BackendUseError:
    """The test or fixture that asks, in one of its threads, has ended."""
    return BackendUseError(
        f"{spec} was asked for by {owner}, which has ended, and its leases with it. Wait for its threads before it"
        " ends, and ask in the test that needs the backend."
    )


def load_asks_for_itself(spec: ModelSpec) -> CacheDeadlockError:
    """A load waits, perhaps through other threads, for itself."""
    return CacheDeadlockError(
        f"the load of {spec} asks, while it is loading, for itself; it would wait forever. A build may ask the cache"
        " for other specs, not for the one that it builds."
    )


def close_asks_for_itself(spec: ModelSpec) -> CacheDeadlockError:
    """A ``close()`` waits for what it closes."""
    return CacheDeadlockError(f"the close of {spec} asks for {spec}; it would wait forever.")
