"""What the files of a spec say, read once for all the steps of a load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_sway.spec.identity import state_of_files

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.checkpoints.safetensors_header import TensorEntry
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all


@dataclass(frozen=True, slots=True)
class Plan:
    """What the files of a spec say, read once for all the steps of a load.

    Attributes:
        spec: The resolved spec.
        state: The state that its files were in.
        files: What the adapter's folder says; ``None`` without an adapter.
        config: What the base's ``config.json`` says; empty if it is not on this machine.
        entries: The tensors of the base's files, by name; ``None`` where they are not known.
    """

    spec: ModelSpec
    state: Hashable
    files: AdapterFiles | None
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry] | None

    def holds_for(self, spec: ModelSpec) -> bool:
        """Whether it is of this spec, and nobody has written to the files since."""
        return self.spec == spec and self.state == state_of_files(spec)
