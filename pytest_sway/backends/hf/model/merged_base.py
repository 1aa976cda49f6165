"""`MergedBase`: a base with adapters merged into it, on which another adapter is put."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.model.base import LoadedBase
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of
from pytest_sway.backends.hf.sharing.trees import tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_sway.backends.hf.model.pristine import Pristine
    from pytest_sway.backends.local.tokenizer_copies import RustRecord

__tracebackhide__ = True


class MergedBase(LoadedBase):
    """A base with adapters merged into it. It has its own memory for what they change, and the base's for the rest.

    Args:
        below: The base, which outlives it.
        pristine: The merged model. Its own tensors are those that differ from the base's.
        brought: The record of the tokenizer that an adapter brings; ``None`` for the base's.
        lacks: The names of the weights of its head that nobody has brought, so that they are noise.

    Attributes:
        below: The base.
        brought: The record of its tokenizer; ``None`` if that is the base's.
    """

    below: LoadedBase

    def __init__(
        self, below: LoadedBase, pristine: Pristine, brought: RustRecord | None, lacks: frozenset[str] = frozenset()
    ) -> None:
        own = set(map(id, pristine.own))
        super().__init__(
            below.spec,
            below.tokenizer if brought is None else brought.tokenizer,
            pristine,
            may_hide_something=below.may_hide_something,
            exposed={name: tensor for name, tensor in pristine.memory.exposed.items() if id(tensor) in own},
            rust=brought,
            lacks=lacks,
        )
        self.below = below
        self.brought = brought
        self.has_tokenizer_of_files = brought is None
        self._of_base = set(_storages(below.pristine.memory.exposed.values()))

    def watch(self, tree: Any) -> None:
        """Watch the memory of a tree of an adapter on it. Only the base watches what may live as long as the base."""
        self.below.watch(tree)
        self.watches.add(tensor for tensor in tensors_of(tree) if self._of_base.isdisjoint(_storages([tensor])))

    def close(self) -> None:
        """Release the model and the base."""
        super().close()
        self.below = self.brought = None  # type: ignore[assignment] # nobody uses a closed base


def _storages(tensors: Iterable[Any]) -> list[int]:
    return [part.untyped_storage()._cdata for tensor in tensors for _, part in parts_of(tensor)]
