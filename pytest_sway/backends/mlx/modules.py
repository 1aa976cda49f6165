"""What stands where in an MLX model, and what stands there instead while a view computes.

MLX's modules are dictionaries, nested through dictionaries and lists: so every module and every array has a place, a
container and a key there, and a model is put into another state by assignments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


class Place(NamedTuple):
    """Where a module or an array stands.

    Attributes:
        container: The module, dictionary or list that holds it.
        key: Its key there.
    """

    container: Any
    key: Any

    @property
    def value(self) -> Any:
        """What stands there now."""
        return self.container[self.key]


def places_of(model: Any) -> dict[str, Place]:
    """Return the places of all modules and arrays in a model, by their names in it."""
    return dict(_places(model, ""))


def arrays_of(model: Any) -> dict[str, Any]:
    """Return all arrays in a model, or in a dictionary of modules, by their names in it."""
    import mlx.core as mx

    return {name: place.value for name, place in places_of(model).items() if isinstance(place.value, mx.array)}


def _places(container: Any, prefix: str) -> Iterator[tuple[str, Place]]:
    import mlx.core as mx
    from mlx import nn

    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        if isinstance(value, nn.Module | mx.array):
            yield f"{prefix}{key}", Place(container, key)
        if isinstance(value, dict | list):
            yield from _places(value, f"{prefix}{key}.")


class Overlay:
    """Values that stand in for others: modules, arrays or numbers. Assigning them twice does no harm.

    Args:
        stand_ins: For each place, what stands there instead.
    """

    def __init__(self, stand_ins: Iterable[tuple[Place, Any]]) -> None:
        self._stand_ins = [(place, place.value, value) for place, value in stand_ins]

    def put_in(self) -> None:
        """Assign the stand-ins."""
        for (container, key), _, value in self._stand_ins:
            container[key] = value

    def take_out(self) -> None:
        """Assign what was there when the overlay was made."""
        for (container, key), original, _ in self._stand_ins:
            container[key] = original


State: TypeAlias = tuple[Overlay, ...]
"""What a view puts its model into, the later ones inside the earlier ones; the base is the empty one."""


class Switch:
    """What state a model is in."""

    def __init__(self) -> None:
        self._state: State = ()

    @contextmanager
    def bound(self, state: State) -> Iterator[None]:
        """Bind ``state`` inside the block, and go back to the one before."""
        before = self._state
        try:
            self.rest(state)
            yield
        finally:
            self.rest(before)

    def rest(self, state: State) -> None:
        """Bind ``state`` until another one is put to rest: it is what the raw model is in.

        Interrupted anywhere, it leaves a mixture that the next call undoes.
        """
        if state == self._state and state == ():
            return
        for overlay in reversed(self._state):
            overlay.take_out()
        self._state = state
        for overlay in state:
            overlay.put_in()

    def leave(self, overlay: Overlay) -> None:
        """Go back to the base if the model rests in a state of ``overlay``."""
        if overlay in self._state:
            self.rest(())
