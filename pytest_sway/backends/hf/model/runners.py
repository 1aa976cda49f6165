"""Runners: trees that compute, and never reach a test. What is idle waits here for the next call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pytest_sway.backends.hf.model.skeletons import OnSkeleton, Skeleton
    from pytest_sway.backends.hf.scoring.forward import Forward

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


@dataclass(slots=True, eq=False)
class Runner:
    """A tree that computes, for one call at a time.

    Attributes:
        tree: The tree: a ``PeftModel``, or the Hugging Face model where there is no adapter.
        forward: Its passes.
        adapter: The adapter whose weights it has, where trees take turns with adapters.
        has_run: Whether it has computed an answer.
    """

    tree: Any
    forward: Forward
    adapter: OnSkeleton | None = None
    has_run: bool = False
    _slots: list[tuple[dict[str, Any], str, str]] = field(default_factory=list)

    def serve(self, adapter: OnSkeleton | None, skeleton: Skeleton) -> None:
        """Exchange its weights for those of another adapter on the same skeleton, or for none."""
        if adapter is self.adapter:
            return
        self._slots = self._slots or skeleton.slots(self.tree)
        self.adapter = adapter
        tensors = skeleton.places if adapter is None else adapter.weights
        for parameters, key, name in self._slots:
            parameters[key] = tensors[name]


class Idle(Protocol):
    """The runners of a side that are in no call."""

    def take(self) -> Runner | None:
        """Return one for a call; ``None`` if there is none."""

    def give(self, runner: Runner) -> None:
        """Take back one that a call is done with."""

    def close(self) -> None:
        """Let go of what is the side's."""


class OwnIdle:
    """The idle runners of one side alone."""

    def __init__(self) -> None:
        self._idle: list[Runner] | None = []

    def take(self) -> Runner | None:
        """Return one for a call; ``None`` if there is none."""
        return self._idle.pop() if self._idle else None

    def give(self, runner: Runner) -> None:
        """Take back one that a call is done with."""
        if self._idle is not None:
            self._idle.append(runner)

    def close(self) -> None:
        """Let go of all."""
        self._idle = None


class SharedIdle:
    """The idle runners of an adapter, which are those of all adapters on its skeleton.

    Args:
        adapter: The adapter.
    """

    def __init__(self, adapter: OnSkeleton) -> None:
        self._adapter: OnSkeleton | None = adapter
        self._skeleton = adapter.skeleton

    def take(self) -> Runner | None:
        """Return one with the adapter's weights; ``None`` if there is none."""
        adapter, idle = self._adapter, self._skeleton.idle
        with self._skeleton.lock:
            if adapter is None or not idle:
                return None
            runner = next((each for each in reversed(idle) if each.adapter is adapter), idle[0])
            idle.remove(runner)
        runner.serve(adapter, self._skeleton)
        return runner

    def give(self, runner: Runner) -> None:
        """Take back one that a call is done with."""
        with self._skeleton.lock:
            runner.serve(self._adapter, self._skeleton)
            self._skeleton.idle.append(runner)

    def close(self) -> None:
        """Leave the adapter's weights in no runner."""
        with self._skeleton.lock:
            adapter, self._adapter = self._adapter, None
            for runner in self._skeleton.idle:
                if runner.adapter is adapter:
                    runner.serve(None, self._skeleton)
