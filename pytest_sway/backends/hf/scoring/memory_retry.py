"""Retries a batch that runs out of memory in halves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.errors import ScoringError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__tracebackhide__ = True

_T = TypeVar("_T")


def in_halves(run: Callable[..., Any], work: Callable[..., list[Any]], batch: Sequence[_T], *args: Any) -> list[Any]:
    """Return ``run(work, batch, *args)``, one answer for each item. If memory runs out, run each half by itself.

    Raises:
        ScoringError: There is not enough memory for a single item.
    """
    try:
        answers: list[Any] = run(work, batch, *args)
        return answers
    except Exception as error:
        if not out_of_memory(error):
            raise
        if len(batch) == 1:
            raise ScoringError(
                "there is not enough memory to run this model on a single text of this length. Shorten the text,"
                f" load fewer or smaller models (--sway-cache-size, dtype), or use another device. ({error})"
            ) from error
    _return_memory()  # after the handler: its error keeps the tensors of the failed pass alive
    middle = len(batch) // 2
    return [
        *in_halves(run, work, batch[:middle], *args),
        *in_halves(run, work, batch[middle:], *args),
    ]


def _return_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
