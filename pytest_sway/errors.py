"""Every error that pytest-sway raises, and its one warning.

The tree::

    SwayError
    ├── SpecError (ValueError)            the spec itself is wrong
    ├── BackendNotAvailableError          nothing installed here can build this kind
    ├── BackendLoadError                  the load started and failed
    │   ├── FilesChangedError             the files changed while they were loaded
    │   └── WeightsError                  a file of weights is missing, unreadable or unsafe
    │       └── AdapterMismatchError      the adapter does not fit, or does nothing
    ├── CacheError
    │   ├── CacheFullError                no room can be made for this load
    │   │   └── ModelTooLargeError        the model alone exceeds the byte budget
    │   ├── CacheDeadlockError            a load waits for itself
    │   └── CacheClosedError              the cache was shut down
    ├── BackendUseError
    │   ├── BackendClosedError            the backend was used after its close
    │   ├── ViewClosedError               a view was used after its ``with`` block
    │   └── NoAdapterError                the spec has no adapter, so it has no fine-tuned side
    ├── ScoringError (ValueError)         the question cannot be scored, or not by this server
    ├── ComparisonError (ValueError)      sway_compare cannot compare its arguments
    │   └── RecordError                   recorded scores are missing, damaged, or of something else
    ├── ServerError                       a server refused, failed, or did not answer
    └── MutationError                     a test left a shared model changed

Each takes one argument, the message, so that an error can be raised again in another test, with a note about the first.
The message says what was asked, what was found and what to do. When an error fails a test, a last line names its entry
in the docs (`name_page`).
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar


def ends_run(error: BaseException) -> bool:
    """Return whether an error is that of ``pytest.exit``. It is an `Exception`, but pytest itself must get it."""
    pytest: Any = sys.modules.get("pytest")
    return pytest is not None and isinstance(error, pytest.exit.Exception)


class SwayError(Exception):
    """Base class of all pytest-sway errors.

    Attributes:
        permanent: Whether the same request fails again until its files change. A run remembers such a failure and does
            not repeat the load for each test.
    """

    permanent: ClassVar[bool] = False


class SpecError(SwayError, ValueError):
    """A spec is malformed, or names something that does not exist."""

    permanent = True


class BackendNotAvailableError(SwayError):
    """This environment cannot build this kind of backend: an extra is missing, or no hook builds it."""

    permanent = True


class BackendLoadError(SwayError):
    """A load started and failed; the original error is the cause."""


class FilesChangedError(BackendLoadError):
    """Files changed while they were loaded, so it is unknown which contents were loaded."""


class WeightsError(BackendLoadError):
    """A weights file is missing, truncated, unreadable or in a format that can run code."""

    permanent = True


class AdapterMismatchError(WeightsError):
    """An adapter or fine-tuned model does not fit its base, was applied only in part, holds NaN or changes nothing."""


class CacheError(SwayError):
    """The cache cannot serve a request."""


class CacheFullError(CacheError):
    """No room can be made: the resident backends are leased, or the device ran out of memory."""


class ModelTooLargeError(CacheFullError):
    """The model alone exceeds the byte budget."""

    permanent = True


class CacheDeadlockError(CacheError):
    """A load requests the backend that it is loading, directly or through another thread's load."""


class CacheClosedError(CacheError):
    """The cache was shut down and serves no more requests."""


class BackendUseError(SwayError):
    """A backend or a view was used in a way that it does not support."""


class BackendClosedError(BackendUseError):
    """A backend was used after the cache closed it, by eviction or at the session's end."""


class ViewClosedError(BackendUseError):
    """A view was used after its ``with`` block."""


class NoAdapterError(BackendUseError):
    """The fine-tuned side was opened on a backend whose spec has no adapter."""


class ScoringError(SwayError, ValueError):
    """A question is malformed or has nothing to score, such as an empty completion, or a server cannot score it."""


class ComparisonError(SwayError, ValueError):
    """``sway_compare`` cannot compare its arguments: a side, the questions, or the values that a score returned."""


class RecordError(ComparisonError):
    """Recorded scores are missing, damaged or of something else, cannot be written, or their base has moved since."""


class ServerError(SwayError):
    """A server refused a request, failed, took too long, or sent an unexpected answer."""


class MutationError(SwayError):
    """A test left a shared model, adapter or tokenizer changed."""


class SwayWarning(UserWarning):
    """You should know something that does not make a result wrong."""


def name_page(error: BaseException) -> bool:
    """Add a note that names the docs entry of a pytest-sway error; return whether ``error`` is one.

    The plugin calls this when an error fails a test or a collection. So the note appears once, at the end, and
    ``pytest.raises(match=...)`` compares the message alone.
    """
    name = next((base.__name__ for base in type(error).__mro__ if base.__module__ == __name__), None)
    if name is None:
        return False
    note = f"See {name} in the docs of pytest-sway: reference/errors.md#{name.lower()}"
    if note not in getattr(error, "__notes__", ()):  # one error can fail several tests
        error.add_note(note)
    return True
