"""A model that never runs: trees are made from it for all that computes, and for all that a test asks for."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.hygiene.weights_watch import WeightsWatch
from pytest_sway.backends.hf.sharing.shared_memory import SharedMemory
from pytest_sway.backends.hf.sharing.trees import shares_objects, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pytest_sway.backends.hf.sharing.shared_memory import Way

__tracebackhide__ = True

_TRIAL: Final = (1, 2)
_MANY: Final = 16


class Watches:
    """What tells whether the weights of some models are still in memory; what is gone takes no room."""

    def __init__(self) -> None:
        self._watches: list[WeightsWatch] = []

    def add(self, tensors: Iterable[Any]) -> None:
        """Watch some more tensors."""
        if len(self._watches) >= _MANY:
            self._watches = [watch for watch in self._watches if watch.alive()]
        self._watches.append(WeightsWatch(tensors))

    def all(self) -> list[WeightsWatch]:
        """Return the watches."""
        return list(self._watches)


class Pristine:
    """A model that never runs.

    Args:
        model: The model, in evaluation mode and frozen.
        again: Loads a model equal to it. It is called for each tree where trees cannot share the model's memory.
        ways: By the identity of a tensor, how it is shared, where that is known already.
        own: The tensors whose memory is this model's alone, and is watched; ``None`` for all of them.
        trial: Compare what two trees compute, since the model is of a kind that may compute with more than it shows.

    Attributes:
        model: The model.
        memory: How its trees get their memory.
        watches: Watches over the weights of all of its trees.
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
        self._own = list(tensors_of(model) if own is None else own)
        self.watches = Watches()
        self.watches.add(self._own)
        self._lock = threading.Lock()
        self._again = None if self._works(trial) else again

    @property
    def shares(self) -> bool:
        """Whether its trees share its memory; otherwise each is loaded anew."""
        return self._again is None

    def exposes(self, name: str, _tensor: Any) -> bool:
        """Whether all trees have the same memory of the tensor of this name."""
        return name in self.memory.exposed

    def tree(self, known: dict[int, Any] | None = None, *, isolated: bool = False, to_run: bool = False) -> Any:
        """Return a model equal to it that is nobody else's.

        Args:
            known: As in `SharedMemory.tree`; it stays empty where the model is loaded anew.
            isolated: Somebody is about to write to its memory; see `SharedMemory.tree`.
            to_run: It only computes; see `SharedMemory.tree`.
        """
        if self._again is not None:
            tree = self._again()
            self.watches.add(tensors_of(tree))
            return tree
        known = {} if known is None else known
        with self._lock:
            tree = self.memory.tree(known, isolated=isolated, to_run=to_run)
        self.watches.add(known[id(tensor)] for tensor in self._own)
        return tree

    def _works(self, trial: bool) -> bool:
        """Whether trees share nothing but memory with the model, and compute."""
        try:
            tree = self.memory.tree()
        except Exception:  # whatever a model holds that cannot be copied
            return False
        if shares_objects(tree, self.model):
            return False
        return not trial or _agree(tree, self.memory.tree())


def _agree(one: Any, other: Any) -> bool:
    """Whether two trees compute the same, to the bit."""
    import torch

    ids = torch.tensor([_TRIAL], device=one.device)
    try:
        with torch.inference_mode():
            first, second = one(input_ids=ids).logits, other(input_ids=ids).logits
    except Exception:  # a model of an unforeseen shape can fail in any way
        return False
    return bool(torch.equal(first.nan_to_num(), second.nan_to_num()))
