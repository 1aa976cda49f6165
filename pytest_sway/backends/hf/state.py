"""Putting a model into the state of a view, and back.

PEFT's own ``set_adapter`` and ``disable_adapter`` walk all modules and take milliseconds. What they come to, for a
model in evaluation, is two attributes of each tuner layer; writing those directly gives bit-equal logits.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_ACTIVE: Final = "_active_adapter"
_DISABLED: Final = "_disable_adapters"
_WRAPPER_ATTRIBUTES: Final = ("active_adapter", "_adapters_disabled")


class Overlay:
    """Values that stand in for others in a model's own dictionaries: scalings, or noise in place of weights.

    Objects change places and nothing is written, so no weight's version counter moves and what was there comes back
    exactly.
    """

    def __init__(self, stand_ins: list[tuple[dict[str, Any], str, Any]]) -> None:
        self._places = [(container, key) for container, key, _ in stand_ins]
        self._others = [value for _, _, value in stand_ins]

    def swap(self) -> None:
        """Exchange the stand-ins with what is in their places; a second swap undoes the first."""
        for i, (container, key) in enumerate(self._places):
            container[key], self._others[i] = self._others[i], container[key]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What a view puts its model into.

    Attributes:
        adapter: The name of the adapter that it is about; ``None`` on a base without.
        enabled: Whether the adapter takes part; without it, the model is its base.
        overlay: What stands in for the adapter's own values.
    """

    adapter: str | None = None
    enabled: bool = False
    overlay: Overlay | None = None


BASE_STATE: Final = State()


class Switch:
    """The attributes of one model that decide which adapter takes part in what it computes."""

    def __init__(self) -> None:
        self._state = BASE_STATE
        self._layers: list[tuple[dict[str, Any], bool]] = []
        self._wrappers: list[dict[str, Any]] = []

    def refresh(self, peft_model: Any, modules: Iterable[Any]) -> None:
        """Find the tuner layers anew; to be called whenever an adapter came or went.

        Args:
            peft_model: The ``PeftModel`` around the base model; ``None`` when there is none.
            modules: The modules among which PEFT's layers are.
        """
        self._layers, self._wrappers = [], []
        if peft_model is None:
            return
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        for module in modules:
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                self._layers.append((module.__dict__, isinstance(module, BaseTunerLayer)))
        self._wrappers = [peft_model.__dict__]
        if isinstance(peft_model.base_model, BaseTuner):  # prompt learning has no tuner in between
            self._wrappers.append(peft_model.base_model.__dict__)
        self._write(self._state)

    @contextmanager
    def bound(self, state: State) -> Iterator[None]:
        """Bind ``state`` inside the block, and leave the model as it was found, also if that was set by hand."""
        before = self._state
        layers = [(attributes, attributes.get(_ACTIVE), attributes.get(_DISABLED)) for attributes, _ in self._layers]
        wrappers = [
            (attributes, [(name, attributes[name]) for name in _WRAPPER_ATTRIBUTES if name in attributes])
            for attributes in self._wrappers
        ]
        try:
            self._enter(state)
            yield
        finally:
            self._exchange(before)
            for attributes, active, disabled in layers:
                attributes[_ACTIVE], attributes[_DISABLED] = active, disabled
            for attributes, saved in wrappers:
                attributes.update(saved)

    def rest(self, state: State) -> None:
        """Bind ``state`` until another one is put to rest: it is what the raw model is in."""
        self._enter(state)

    def leave(self, adapter: str) -> None:
        """Go back to the base if the model rests in a state of ``adapter``."""
        if self._state.adapter == adapter:
            self._enter(BASE_STATE)
        for attributes, _ in self._layers:
            if adapter in attributes[_ACTIVE]:
                attributes[_ACTIVE] = []
        for attributes in self._wrappers:  # PEFT looks up the active adapter whenever it puts on another
            if adapter in attributes["active_adapter"]:
                attributes["active_adapter"] = []

    def drop(self, overlay: Overlay) -> None:
        """Take ``overlay`` out if the model rests in it; the adapter's own values come back."""
        if self._state.overlay is overlay:
            self._enter(replace(self._state, overlay=None))

    def _enter(self, state: State) -> None:
        self._exchange(state)
        self._write(state)

    def _exchange(self, state: State) -> None:
        if self._state.overlay is not state.overlay:
            if self._state.overlay is not None:
                self._state.overlay.swap()
            if state.overlay is not None:
                state.overlay.swap()
        self._state = state

    def _write(self, state: State) -> None:
        disabled = not state.enabled
        names = [] if state.adapter is None else [state.adapter]
        for attributes, is_tuner_layer in self._layers:
            attributes[_DISABLED] = disabled
            if names:
                attributes[_ACTIVE] = names if is_tuner_layer else state.adapter
        for attributes in self._wrappers:
            if "_adapters_disabled" in attributes:
                attributes["_adapters_disabled"] = disabled
            if names:
                attributes["active_adapter"] = state.adapter
