"""`Pristine`: a model that never runs. Trees are made from it to compute, and for tests that ask for the model."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.hygiene.memory import WeightsWatch
from pytest_sway.backends.hf.loading.tasks import numbers
from pytest_sway.backends.hf.sharing.shared_memory import SharedMemory
from pytest_sway.backends.hf.sharing.trees import shares_objects, tensors_of
from pytest_sway.backends.libraries.process import no_warnings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pytest_sway.backends.hf.sharing.tensor_memory import Way

__tracebackhide__ = True

_TRIAL_IDS: Final = (1, 2)
_MOST_WATCHES: Final = 16


class Watches:
    """Watches over the weights of several models. Watches of freed weights are dropped from time to time."""

    def __init__(self) -> None:
        self._watches: list[WeightsWatch] = []

    def add(self, tensors: Iterable[Any]) -> None:
        """Watch more tensors."""
        if len(self._watches) >= _MOST_WATCHES:
            self._watches = [watch for watch in self._watches if watch.alive()]
        self._watches.append(WeightsWatch(tensors))

    def all(self) -> list[WeightsWatch]:
        """Return the watches."""
        return list(self._watches)


class Pristine:
    """A model that never runs, and from which trees are made.

    Args:
        model: The model, in evaluation mode and frozen.
        again: Loads an equal model. It is called for each tree if trees cannot share the model's memory.
        ways: How tensors are shared, by the ``id`` of the tensor, where that is known already.
        own: The tensors to watch, whose memory only this model has; ``None`` for all of them.
        trial: Compare what two trees compute, because the model may compute with state that its modules do not show.

    Attributes:
        model: The model.
        memory: Gives trees their memory.
        own: Its tensors whose memory only this model has.
        watches: Watches over the weights of all trees.
    """

    def __init__(
        self,
        model: Any,
        again: Callable[[], Any],
        *,
        ways: Mapping[int, Way] | None = None,
        own: Iterable[Any] | None = None,
        trial: bool = False,
    ) -> None:
        self.model = model
        self.memory = SharedMemory(model, ways)
        self.own = list(tensors_of(model) if own is None else own)
        self.watches = Watches()
        self.watches.add(self.own)
        self._lock = threading.Lock()
        self._first: tuple[Any, dict[int, Any]] | None = None
        self._again = None if self._works(trial) else again

    @property
    def shares(self) -> bool:
        """Whether trees share its memory; otherwise each is loaded anew."""
        return self._again is None

    def exposes(self, name: str, _tensor: Any) -> bool:
        """Return whether all trees have the same memory for the tensor of this name."""
        return name in self.memory.exposed

    def tree(self, known: dict[int, Any] | None = None, *, isolated: bool = False, to_run: bool = False) -> Any:
        """Return a new tree that nobody else uses.

        Args:
            known: See `SharedMemory.tree`; it stays empty if the model is loaded anew.
            isolated: The caller is about to write to the tree's memory; see `SharedMemory.tree`.
            to_run: The tree only computes; see `SharedMemory.tree`.
        """
        if self._again is not None:
            tree = self._again()
            self.watches.add(tensors_of(tree))
            return tree
        known = {} if known is None else known
        with self._lock:
            if self._first is not None and not (known or isolated or to_run):
                (tree, made), self._first = self._first, None
                known.update(made)
            else:
                tree = self.memory.tree(known, isolated=isolated, to_run=to_run)
        self.watches.add(known[id(tensor)] for tensor in self.own)
        return tree

    def _works(self, trial: bool) -> bool:
        """Return whether trees share nothing but memory with the model, and agree if they are tried.

        A tree that was made for this, and has not run, is kept for the first who asks for one.
        """
        known, taken = dict[int, Any](), list[Any]()
        try:
            tree = self.memory.tree(known, taken=taken)
        except Exception:  # a model may hold anything that cannot be copied
            return False
        if shares_objects(taken, self.model):
            return False
        if trial:
            return _agree(tree, self.memory.tree())
        self._first = tree, known
        return True


def _agree(one: Any, other: Any) -> bool:
    """Return whether two trees compute the same numbers, to the bit."""
    import torch

    try:
        with no_warnings(), torch.inference_mode():
            first, second = numbers(one, _TRIAL_IDS), numbers(other, _TRIAL_IDS)
    except Exception:  # an unknown architecture may raise anything
        return False
    return bool(torch.equal(first.nan_to_num(), second.nan_to_num()))
