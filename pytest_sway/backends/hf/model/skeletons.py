"""Skeletons: models that PEFT makes from a configuration, without adapter weights.

PEFT puts the first adapter of a configuration on the base, which is slow. The result is kept as a skeleton. Later
adapters with the same configuration only bring weights. A tree serves another adapter as soon as it has that adapter's
weights, so adapters take turns on the same trees.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pytest_sway.backends.checkpoints.peft_adapter import NAME, is_adapters
from pytest_sway.backends.hf.model.pristine import Watches
from pytest_sway.backends.hf.sharing.shared_memory import SharedMemory, SharedTensors
from pytest_sway.backends.hf.sharing.trees import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_sway.backends.hf.model.pristine import Pristine
    from pytest_sway.backends.hf.scoring.forward import Forward

__tracebackhide__ = True


class Skeleton:
    """A model that PEFT makes from a configuration, without adapter weights.

    Args:
        pristine: The ``PeftModel`` with an adapter of this configuration.
        own: The adapter's tensors, by their names in the ``PeftModel``. Its file must have all of them.

    Attributes:
        model: The ``PeftModel``.
        places: Placeholders with the shape and dtype of the adapter's tensors, by their names in its file.
        devices: The devices of these tensors; a base may be spread over several.
        names: The names of these tensors in the ``PeftModel``, by their names in the file.
        scaling: The largest LoRA scaling.
        idle: The runners for its adapters that are in no call.
        lock: Held while a runner is taken or given back.
    """

    def __init__(self, pristine: Pristine, own: Mapping[str, Any]) -> None:
        import torch

        memory, known = pristine.memory, dict[int, Any]()
        for tensor in own.values():
            known[id(tensor)] = torch.nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
        self.places = {name_in_file(name): known[id(tensor)] for name, tensor in own.items()}
        self.devices = {name_in_file(name): tensor.device for name, tensor in own.items()}
        self.names = {name_in_file(name): name for name in own}
        self.model = memory.tree(known)
        self.scaling = largest_scaling(self.model)
        self.idle: list[Runner] = []
        self.lock = threading.Lock()
        self._memory = SharedMemory(self.model, memory.ways_in(known))

    @property
    def device(self) -> Any | None:
        """The device of all of an adapter's tensors; ``None`` if they are on several."""
        devices = set(self.devices.values())
        return devices.pop() if len(devices) == 1 else None

    def placed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return an adapter's tensors as parameters in their places: copies, with the device and dtype of each place.

        Args:
            tensors: The tensors by their names in the file.

        Raises:
            RuntimeError: A tensor does not have the shape of its place.
        """
        return {name: _parameter(tensors[name], place, self.devices[name]) for name, place in self.places.items()}

    def tree(self, weights: Mapping[str, Any], config: Any, *, to_run: bool = False) -> Any:
        """Return a ``PeftModel`` with an adapter's weights.

        Args:
            weights: The adapter's tensors for this tree, by their names in the file.
            config: The adapter's configuration.
            to_run: The tree only computes; see `SharedMemory.tree`.
        """
        tree = self._memory.tree({id(place): weights[name] for name, place in self.places.items()}, to_run=to_run)
        tree.peft_config[NAME] = config
        return tree

    def slots(self, tree: Any) -> list[tuple[dict[str, Any], str, str]]:
        """Return where a tree has adapter tensors: a module's parameters, the key there, the name in the file."""
        names = {id(place): name for name, place in self.places.items()}
        pairs = zip(modules_of(self.model), modules_of(tree), strict=True)
        return [
            (theirs._parameters, key, names[id(place)])
            for (_, ours), (_, theirs) in pairs
            for key, place in ours._parameters.items()
            if id(place) in names
        ]


class OnSkeleton:
    """An adapter as a skeleton and weights, from which trees are made.

    Args:
        skeleton: The skeleton.
        config: The adapter's configuration.
        weights: The adapter's tensors, by their names in its file.
        memory: Tensors that together hold exactly ``weights``: the same tensors, or larger ones that they are parts of.

    Attributes:
        model: The ``PeftModel``, without weights.
        shares: Whether trees share the base's memory.
        watches: Watches over the adapter's tensors in all trees.
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
        """Return whether all trees have the same memory for one of the adapter's tensors."""
        return self._shared.exposes(tensor)

    def tree(self, *, to_run: bool = False) -> Any:
        """Return a new ``PeftModel`` that nobody else uses.

        Args:
            to_run: The tree only computes; see `SharedMemory.tree`.
        """
        ours = self._shared.shared()
        self.watches.add(ours)
        weights = dict(zip(self.weights, ours, strict=True))
        return self.skeleton.tree(weights, copy.deepcopy(self._config), to_run=to_run)


def _parameter(tensor: Any, place: Any, device: Any) -> Any:
    import torch

    if tensor.shape != place.shape:
        found, asked = list(tensor.shape), list(place.shape)
        raise RuntimeError(  # in torch's words
            f"size mismatch for a parameter of the model: torch.Size({found}) from checkpoint, the shape in current"
            f" model is torch.Size({asked})."
        )
    return torch.nn.Parameter(tensor.to(device, place.dtype, copy=True), requires_grad=False)


def name_in_file(name: str) -> str:
    """Return the name in the file of an adapter's tensor, from its name in the ``PeftModel``."""
    return name.replace(f".{NAME}", "")


@dataclass(slots=True, eq=False)
class Runner:
    """A tree that computes, for one call at a time.

    Attributes:
        tree: The tree: a ``PeftModel``, or the Hugging Face model where there is no adapter.
        forward: Its forward passes.
        adapter: The adapter whose weights it has; ``None`` if it has none, or serves one adapter only.
        has_run: Whether it has completed a call.
    """

    tree: Any
    forward: Forward
    adapter: OnSkeleton | None = None
    has_run: bool = False
    _slots: list[tuple[dict[str, Any], str, str]] = field(default_factory=list)

    def serve(self, adapter: OnSkeleton | None, skeleton: Skeleton) -> None:
        """Exchange its weights for another adapter's on the same skeleton, or for placeholders."""
        if adapter is self.adapter:
            return
        self._slots = self._slots or skeleton.slots(self.tree)
        self.adapter = adapter
        tensors = skeleton.places if adapter is None else adapter.weights
        for parameters, key, name in self._slots:
            parameters[key] = tensors[name]


class Idle(Protocol):
    """Keeps the runners of a bound model between calls."""

    def take(self) -> Runner | None:
        """Return a runner for a call; ``None`` if none is idle."""

    def give(self, runner: Runner) -> None:
        """Take back a runner after a call."""

    def close(self) -> None:
        """Release everything that belongs to this bound model alone."""


class OwnIdle:
    """The idle runners of one bound model."""

    def __init__(self) -> None:
        self._idle: list[Runner] | None = []

    def take(self) -> Runner | None:
        """Return a runner for a call; ``None`` if none is idle."""
        return self._idle.pop() if self._idle else None

    def give(self, runner: Runner) -> None:
        """Take back a runner after a call."""
        if self._idle is not None:
            self._idle.append(runner)

    def close(self) -> None:
        """Release all runners."""
        self._idle = None


class SharedIdle:
    """The idle runners that all adapters on one skeleton share.

    Args:
        adapter: The adapter whose bound model uses them here.
    """

    def __init__(self, adapter: OnSkeleton) -> None:
        self._adapter: OnSkeleton | None = adapter
        self._skeleton = adapter.skeleton

    def take(self) -> Runner | None:
        """Return a runner with the adapter's weights; ``None`` if none is idle."""
        idle = self._skeleton.idle
        with self._skeleton.lock:  # `close` may come from another thread
            adapter = self._adapter
            if adapter is None or not idle:
                return None
            runner = next((each for each in reversed(idle) if each.adapter is adapter), idle[0])
            idle.remove(runner)
            runner.serve(adapter, self._skeleton)
        return runner

    def give(self, runner: Runner) -> None:
        """Take back a runner after a call."""
        with self._skeleton.lock:
            runner.serve(self._adapter, self._skeleton)
            self._skeleton.idle.append(runner)

    def close(self) -> None:
        """Remove the adapter's weights from all idle runners."""
        with self._skeleton.lock:
            adapter, self._adapter = self._adapter, None
            for runner in self._skeleton.idle:
                if runner.adapter is adapter:
                    runner.serve(None, self._skeleton)


def adapter_parameters(peft_model: Any) -> dict[str, Any]:
    """Return the adapter's parameters by name, in the order of ``named_parameters()``."""
    return {name: parameter for name, parameter in peft_model.named_parameters() if is_adapters(name)}


def scalings_of(peft_model: Any) -> list[dict[str, float]]:
    """Return the ``scaling`` dictionaries of the LoRA layers with the adapter; the factors have no unit."""
    from peft.tuners.lora import LoraLayer

    layers = (module for _, module in modules_of(peft_model) if isinstance(module, LoraLayer))
    return [layer.scaling for layer in layers if NAME in layer.scaling]


def largest_scaling(peft_model: Any) -> float:
    """Return the largest LoRA scaling; 1 if there is none."""
    return max((abs(scaling[NAME]) for scaling in scalings_of(peft_model)), default=1.0)


def inner_model(peft_model: Any) -> Any:
    """Return the Hugging Face model inside a ``PeftModel``, with PEFT's layers in it; any other model as it is."""
    return peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model
