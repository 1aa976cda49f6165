"""`Skeletons`: a base's most recently used skeletons, by adapter configuration."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.peft_adapter import NAME
from pytest_sway.backends.hf.model.skeletons import Skeleton, name_in_file

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.backends.hf.model.pristine import Pristine

__tracebackhide__ = True

_UNSEEN_FIELDS: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
)
"""Config fields that do not affect the model that PEFT makes."""

_ORDERED_FIELDS: Final = ("alpha_pattern", "rank_pattern")
"""Config fields whose order counts: PEFT applies the first expression that matches."""

_MOST: Final = 8
"""Skeletons kept for each base."""


class Skeletons:
    """The most recently used skeletons of a base."""

    def __init__(self) -> None:
        self._skeletons: OrderedDict[Hashable, Skeleton] = OrderedDict()

    def find(self, files: AdapterFiles, config: Any) -> Skeleton | None:
        """Return the skeleton for an adapter; ``None`` if there is none.

        Args:
            files: The adapter's files.
            config: The adapter's configuration, as its file has it: PEFT changes the one that it gets.
        """
        signature = _signature(files, config)
        skeleton = self._skeletons.get(signature)
        if skeleton is not None:
            self._skeletons.move_to_end(signature)
        return skeleton

    def made_of(self, files: AdapterFiles, config: Any, pristine: Pristine, own: Mapping[str, Any]) -> Skeleton | None:
        """Make a skeleton that the next adapters can use; return ``None`` if adapters of this kind allow none.

        Args:
            files: The adapter's files.
            config: The adapter's configuration, as its file has it: PEFT changes the one that it gets.
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


def adopted(config: Any, skeleton: Skeleton) -> Any:
    """Return an adapter's configuration with the changes that PEFT made to that of the skeleton's first adapter.

    PEFT writes the modules that it has found in the place of ``target_modules="all-linear"``, for example.

    Args:
        config: The adapter's configuration, as its file has it.
        skeleton: The skeleton of this configuration.
    """
    changed = copy.deepcopy(skeleton.model.peft_config[NAME])
    for name in _UNSEEN_FIELDS:
        setattr(changed, name, getattr(config, name))
    return changed


def _signature(files: AdapterFiles, config: Any) -> Hashable:
    """Return a key that is equal for adapters that differ only in the values of their weights."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _UNSEEN_FIELDS}
    fields |= {name: list(fields[name].items()) for name in _ORDERED_FIELDS if fields.get(name)}
    text = json.dumps(
        fields, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    return text, frozenset((name, entry.dtype, entry.shape) for name, entry in (files.entries or {}).items())
