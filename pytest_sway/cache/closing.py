"""`Closer`: closes entries outside the lock, and gives back what an operation has taken, after an error."""

from __future__ import annotations

import logging
from operator import call
from typing import TYPE_CHECKING, Final, final

from pytest_sway.backends.contract import closers_of, closes_again
from pytest_sway.cache.entries import Operation, State
from pytest_sway.errors import ends_run
from pytest_sway.system.locking import close_all
from pytest_sway.system.redaction import redacted, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_sway.cache.builds import Listener
    from pytest_sway.cache.entries import Entry
    from pytest_sway.cache.ledger import Ledger
    from pytest_sway.cache.stats import SwayStats

__tracebackhide__ = True

_log = logging.getLogger(__name__)


@final
class Closer:
    """Closes the entries of one cache. A ``close()`` that raises fails no request; the error is logged and counted.

    Args:
        ledger: The entries.
        listener: Is told of each close.
        stats: The counts to update.
    """

    def __init__(self, ledger: Ledger, listener: Listener, stats: SwayStats) -> None:
        self._ledger: Final = ledger
        self._listener: Final = listener
        self._stats: Final = stats

    def close_each(self, take: Callable[[Operation], None]) -> None:
        """Close the victims that ``take`` gives an operation, even if some of the closes raise."""
        operation = Operation("")
        try:
            take(operation)
            self.close_victims(operation)
        except BaseException as error:
            self.abandon(operation)
            without_secrets(error)
            raise

    def close_victims(self, operation: Operation) -> None:
        """Close the entries that an operation has set to CLOSING."""
        while operation.victims:
            self._close(operation, operation.victims[0])

    def abandon(self, operation: Operation) -> None:
        """Give back all that an operation has taken, after an error or an interrupt."""
        entry = operation.entry
        try:
            if entry is not None and entry.state is State.LOADING:
                self._close_unfinished(operation, entry)
        finally:  # a close may take seconds, so an interrupt may well come in it
            self._ledger.undo(operation)

    def _close(self, operation: Operation, entry: Entry) -> None:
        try:
            self._call_closers(entry, f"closing {entry.spec} failed")
        finally:
            cached = self._ledger.forget(operation, entry)
        if cached is not None:
            self._listener.evicted(cached)

    def _close_unfinished(self, operation: Operation, entry: Entry) -> None:
        if operation.built:
            entry.closers[:] = closers_of(operation.built)
            operation.built.clear()
        self._call_closers(entry, f"closing {entry.spec}, which was never handed out, failed")

    def _call_closers(self, entry: Entry, failure: str) -> None:
        entry.close_begun = True
        try:
            close_all(entry.closers, call, closes_again)
        except Exception as raised:
            if ends_run(raised):
                raise
            _log.warning(failure, exc_info=without_secrets(raised))
            self._stats.close_errors.append(f"{failure}: {type(raised).__name__}: {redacted(str(raised))}")
