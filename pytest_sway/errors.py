"""Every error that pytest-sway raises, and its one warning.

The tree::

    SwayError
    ├── SpecError (ValueError)            the spec itself is wrong
    ├── BackendNotAvailableError          nothing installed here can build this kind
    ├── BackendLoadError                  the load was tried and failed
    │   ├── FilesChangedError             somebody wrote to the files while they were loaded
    │   └── WeightsError                  a file of weights is missing, unreadable or unsafe
    │       └── AdapterMismatchError      the adapter does not fit, or does nothing
    ├── CacheError
    │   ├── CacheFullError                nothing can be evicted for this load
    │   │   └── ModelTooLargeError        the model alone is over the byte budget
    │   ├── CacheDeadlockError            a load waits, through others, for itself
    │   └── CacheClosedError              the cache was shut down
    ├── BackendUseError
    │   ├── BackendClosedError            the backend was used after its close
    │   ├── ViewClosedError               a view was used after its ``with`` block
    │   └── NoAdapterError                the fine-tuned side of a spec without adapter
    ├── ScoringError (ValueError)         what was passed cannot be scored, or not by this model's server
    ├── ComparisonError (ValueError)      what was passed to sway_compare cannot be compared
    │   └── RecordError                   recorded scores are missing, of something else, or damaged
    ├── ServerError                       a server refused, failed, or did not answer
    └── MutationError                     a test left a shared model changed

Each takes one argument, the message, so that an error can be raised again in another test with a word about the
first. The message says what was asked, what was found and what to do. Where an error fails a test, a last line names
its place in the docs (`name_page`).
"""

from __future__ import annotations

from typing import ClassVar


class SwayError(Exception):
    """Root of the errors of pytest-sway.

    Attributes:
        permanent: The same request would fail again, as long as no file of it changes. A run remembers such a failure
            and does not try the load again for each test.
    """

    permanent: ClassVar[bool] = False


class SpecError(SwayError, ValueError):
    """A spec is malformed, or names something that does not exist."""

    permanent = True


class BackendNotAvailableError(SwayError):
    """A kind of backend that this environment cannot build: an extra is missing, or nobody builds it."""

    permanent = True


class BackendLoadError(SwayError):
    """A load was tried and failed; the original error is the cause."""


class FilesChangedError(BackendLoadError):
    """Files were written while they were loaded, so nobody knows what was loaded."""


class WeightsError(BackendLoadError):
    """A file of weights is missing, truncated, unreadable or of a format that can run code."""

    permanent = True


class AdapterMismatchError(WeightsError):
    """An adapter or fine-tuned model that does not fit its base, was not applied in full, holds NaN or does nothing."""


class CacheError(SwayError):
    """The cache cannot serve a request."""


class CacheFullError(CacheError):
    """No room can be made: what is resident is leased, or the memory of the device ran out."""


class ModelTooLargeError(CacheFullError):
    """A model that is over the whole byte budget by itself."""

    permanent = True


class CacheDeadlockError(CacheError):
    """A load asks, directly or through another thread's load, for the very backend that it is loading."""


class CacheClosedError(CacheError):
    """The cache was shut down and hands out nothing any more."""


class BackendUseError(SwayError):
    """A backend or a view was used in a way that it cannot serve."""


class BackendClosedError(BackendUseError):
    """A backend was used after it was closed, by eviction or at the session's end."""


class ViewClosedError(BackendUseError):
    """A view was used after the ``with`` block that opened it."""


class NoAdapterError(BackendUseError):
    """The fine-tuned side was asked of a backend whose spec has no adapter."""


class ScoringError(SwayError, ValueError):
    """What was passed leaves nothing to score, such as a completion of no tokens, or a server cannot score it."""


class ComparisonError(SwayError, ValueError):
    """What was passed to ``sway_compare`` cannot be compared: a side, the questions, or what a score gave."""


class RecordError(ComparisonError):
    """Recorded scores are missing, damaged or of something else, cannot be written, or their base has moved since."""


class ServerError(SwayError):
    """A server that a backend asks refused, failed, took too long, or answered something else."""


class MutationError(SwayError):
    """A test left a shared model, adapter or tokenizer other than it found it."""


class SwayWarning(UserWarning):
    """Something that the user should know and that does not make a result wrong."""


def name_page(error: BaseException) -> bool:
    """Add a note to an error of this module that says where the docs explain it, and return whether it is one.

    The plugin calls it when an error fails a test or a collection, not the error itself when it is made: so the line
    stands once, at the end, and ``pytest.raises(match=...)`` compares the message alone.
    """
    name = next((base.__name__ for base in type(error).__mro__ if base.__module__ == __name__), None)
    if name is None:
        return False
    note = f"See {name} in the docs of pytest-sway: reference/errors.md#{name.lower()}"
    if note not in getattr(error, "__notes__", ()):  # one error can fail several tests
        error.add_note(note)
    return True
