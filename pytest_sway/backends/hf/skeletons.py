"""Skeletons: what PEFT makes of a configuration, without weights.

The first adapter of a configuration is put on the base by PEFT, which takes long, and leaves a skeleton. After that, an
adapter of this configuration is its weights. A tree that computes for one of them computes for another as soon as it
has the other's weights; so they take turns, and nobody makes a tree for each.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.adapter import NAME, largest_scaling
from pytest_sway.backends.hf.pristine import Watches
from pytest_sway.backends.hf.shared_memory import SharedMemory, SharedTensors
from pytest_sway.backends.hf.trees import modules_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.pristine import Pristine
    from pytest_sway.backends.hf.runners import Runner

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_UNSEEN_FIELDS: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
)
"""Fields of a config that do not show in what PEFT makes of it."""

_ORDERED_FIELDS: Final = ("alpha_pattern", "rank_pattern")
"""Of their expressions, PEFT takes the first that matches."""

_MOST: Final = 8
"""So many skeletons are kept for each base, those that were used last."""


class Skeleton:
    """What PEFT makes of a configuration, without weights.

    Args:
        pristine: The ``PeftModel`` with an adapter of this configuration.
        own: The adapter's tensors, which are all in its file, by their names in the ``PeftModel``.

    Attributes:
        model: The ``PeftModel``.
        places: By the names of an adapter's tensors in its file, what stands for them in the model: shape and dtype.
        names: By the same names, those that they have in the ``PeftModel``.
        scaling: The largest factor that the product of two LoRA matrices is multiplied by.
        idle: The trees that compute for its adapters and are in no call now.
        lock: Held while one is taken or given back.
    """

    def __init__(self, pristine: Pristine, own: Mapping[str, Any]) -> None:
        import torch

        memory, known = pristine.memory, dict[int, Any]()
        for tensor in own.values():
            known[id(tensor)] = torch.nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
        self.places = {name_in_file(name): known[id(tensor)] for name, tensor in own.items()}
        self.names = {name_in_file(name): name for name in own}
        self.model = memory.tree(known)
        self.scaling = largest_scaling(self.model)
        self.idle: list[Runner] = []
        self.lock = threading.Lock()
        self._memory = SharedMemory(self.model, memory.ways_in(known))

    def tree(self, weights: Mapping[str, Any], config: Any, *, to_run: bool = False) -> Any:
        """Return a ``PeftModel`` with the weights of an adapter.

        Args:
            weights: The tree's tensors, by their names in the file.
            config: The adapter's configuration.
            to_run: It only computes; see `SharedMemory.tree`.
        """
        tree = self._memory.tree({id(place): weights[name] for name, place in self.places.items()}, to_run=to_run)
        tree.peft_config[NAME] = config
        return tree

    def slots(self, tree: Any) -> list[tuple[dict[str, Any], str, str]]:
        """Return where a tree has an adapter's tensors: a module's parameters, the key there, the name in the file."""
        names = {id(place): name for name, place in self.places.items()}
        pairs = zip(modules_of(self.model), modules_of(tree), strict=True)
        return [
            (theirs._parameters, key, names[id(place)])
            for (_, ours), (_, theirs) in pairs
            for key, place in ours._parameters.items()
            if id(place) in names
        ]


class OnSkeleton:
    """An adapter as a skeleton and its weights: trees with it are made from that.

    Args:
        skeleton: The skeleton.
        config: The adapter's configuration.
        weights: The adapter's tensors, by their names in its file.
        memory: Tensors that together hold just those: themselves, or what they are parts of.

    Attributes:
        model: The ``PeftModel``, without weights.
        shares: Whether trees share the base's memory.
        watches: Watches over the adapter's tensors, wherever they are used.
        weights: The adapter's tensors, by their names in its file.
        skeleton: The skeleton.
    """

    shares = True

    def __init__(self, skeleton: Skeleton, config: Any, weights: dict[str, Any], memory: Iterable[Any]) -> None:
        self.model = skeleton.model
        self.skeleton = skeleton
        self.weights = weights
        self.watches = Watches()
        self.watches.add(memory)
        self._config = config
        self._shared = SharedTensors(weights.values())

    def exposes(self, _name: str, tensor: Any) -> bool:
        """Whether all trees have the same memory of one of the adapter's tensors."""
        return self._shared.exposes(tensor)

    def tree(self, *, to_run: bool = False) -> Any:
        """Return a ``PeftModel`` that is nobody else's.

        Args:
            to_run: It only computes; see `SharedMemory.tree`.
        """
        ours = self._shared.shared()
        self.watches.add(ours)
        weights = dict(zip(self.weights, ours, strict=True))
        return self.skeleton.tree(weights, copy.deepcopy(self._config), to_run=to_run)


class Skeletons:
    """The skeletons of a base: those that were used last."""

    def __init__(self) -> None:
        self._skeletons: OrderedDict[Hashable, Skeleton] = OrderedDict()

    def find(self, files: AdapterFiles, config: Any) -> Skeleton | None:
        """Return the skeleton of an adapter with all of its tensors; ``None`` if there is none.

        Args:
            files: The adapter.
            config: Its configuration, as PEFT has read it.
        """
        signature = _signature(files, config)
        skeleton = self._skeletons.get(signature)
        if skeleton is not None:
            self._skeletons.move_to_end(signature)
        return skeleton

    def made_of(self, files: AdapterFiles, config: Any, pristine: Pristine, own: Mapping[str, Any]) -> Skeleton | None:
        """Return a new skeleton, which the next adapters find; ``None`` if no adapter is like another of its kind.

        Args:
            files: The adapter.
            config: Its configuration, as PEFT has read it.
            pristine: The ``PeftModel`` with the adapter.
            own: The adapter's tensors, by their names in the ``PeftModel``.
        """
        is_all_in_file = files.entries is not None and set(map(name_in_file, own)) == files.entries.keys()
        if files.peft_type != "LORA" or not is_all_in_file or not pristine.shares:
            return None  # something depends on the base's weights, or trees share no memory
        skeleton = self._skeletons[_signature(files, config)] = Skeleton(pristine, own)
        while len(self._skeletons) > _MOST:
            self._skeletons.popitem(last=False)
        return skeleton


def name_in_file(name: str) -> str:
    """Return the name of a tensor of the adapter in its file."""
    return name.replace(f".{NAME}", "")


def _signature(files: AdapterFiles, config: Any) -> Hashable:
    """Equal for adapters of which PEFT makes the same, but for their weights."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _UNSEEN_FIELDS}
    fields |= {name: list(fields[name].items()) for name in _ORDERED_FIELDS if fields.get(name)}
    text = json.dumps(
        fields, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    return text, frozenset((name, entry.dtype, entry.shape) for name, entry in (files.entries or {}).items())
