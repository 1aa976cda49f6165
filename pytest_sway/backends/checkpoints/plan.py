"""`Plan`: what a check finds out about a spec, read once for all the steps of its load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_sway.spec.identity import Key, resolved_key, state_of_files

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from pytest_sway.backends.checkpoints.gguf_header import GgufHeader
    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the files of one model say: of a base, or of what it was fine-tuned to.

    Attributes:
        spec: The resolved spec of this model alone.
        key: Its identity, under which it is shared.
        config: What its ``config.json`` says; empty if that is not on this machine.
        entries: The tensors of its safetensors by name; ``None`` where they are not known.
        gguf: The header of its GGUF file, where it is one.
    """

    spec: ModelSpec
    key: Key
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry] | None
    gguf: GgufHeader | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a check has found out about a spec, for all the steps of its load.

    Attributes:
        spec: The resolved spec.
        key: Its identity.
        state: The state of its files before they were read; another state later says that somebody wrote to them.
        read: What its kind read for the build: an adapter's files, canned answers, a class; ``None`` for nothing.
        models: The models that it shares with others: its base, and after it a whole fine-tuned model.
        sizes: The bytes that each part will take, by part; ``None`` where that cannot be known.
    """

    spec: ModelSpec
    key: Key
    state: Hashable
    read: Any = None
    models: tuple[ModelFiles, ...] = ()
    sizes: Mapping[Hashable, int] | None = None

    @classmethod
    def of(cls, spec: ModelSpec) -> Plan:
        """Return the plan of a resolved spec, before anything is read for it."""
        state = state_of_files(spec)  # before the key, so that no change comes between
        return cls(spec, resolved_key(spec), state)
