"""`Plan`: what a check found out about a spec, for all steps of its load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_sway.spec.identity import Key, resolved_key, state_of_files

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from pytest_sway.backends.checkpoints.gguf_header import GgufHeader
    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model: a base, a fine-tuned model, or one of these with adapters merged into it.

    Attributes:
        spec: The resolved spec of this model alone.
        key: Its cache key, under which it is shared.
        config: Its ``config.json``; empty if that is not on this machine.
        entries: The tensors of its safetensors files by name; ``None`` if unknown.
        gguf: The header of its GGUF file; ``None`` if it is none.
        merged: The adapters that are merged into it, in order; none for a model that is loaded as it is.
    """

    spec: ModelSpec
    key: Key
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry] | None
    gguf: GgufHeader | None = None
    merged: tuple[AdapterFiles, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a check found out about a spec, for all steps of its load.

    Attributes:
        spec: The resolved spec.
        key: Its cache key.
        state: The state of its files before they were read; another state later shows that something wrote to them.
        read: What its kind read for the build: an adapter's files, canned answers or a class; ``None`` for nothing.
        models: The models that it shares with other specs: its base, then a whole fine-tuned model, then the last of
            these with all adapters but the last merged into it. An adapter is put on the last model.
        sizes: The bytes that each part will take; ``None`` if unknown.
    """

    spec: ModelSpec
    key: Key
    state: Hashable
    read: Any = None
    models: tuple[ModelFiles, ...] = ()
    sizes: Mapping[Hashable, int] | None = None

    @classmethod
    def of(cls, spec: ModelSpec) -> Plan:
        """Return the plan of a resolved spec for which nothing has been read."""
        state = state_of_files(spec)  # before the key, so that no change is missed
        return cls(spec, resolved_key(spec), state)
