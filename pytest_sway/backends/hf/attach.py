"""Putting an adapter on its base, and making sure that it is really there.

PEFT puts it on a tree of the base, so the base stays as it is, whatever PEFT does. The result is kept as a skeleton,
without the adapter's weights. For the next adapter of the same configuration, a copy of the skeleton with other weights
comes to the same, bit by bit, in a fraction of the time.
"""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.exhaustion import out_of_memory
from pytest_sway.backends.hf.adapter import NAME, Adapter, adapter_parameters
from pytest_sway.backends.hf.adapter_errors import refused
from pytest_sway.backends.hf.adapter_files import CONFIG, WEIGHTS, read_adapter
from pytest_sway.backends.hf.bounds import shown
from pytest_sway.backends.hf.libraries import quiet_process, seeded
from pytest_sway.backends.hf.pickles import read_pickle, with_entries
from pytest_sway.backends.hf.pristine import Pristine, Watches
from pytest_sway.backends.hf.shared_memory import SharedMemory, SharedTensors
from pytest_sway.backends.hf.verification import verify_keys, verify_trained, verify_values
from pytest_sway.errors import SpecError, SwayError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from pytest_sway.backends.hf.adapter_files import AdapterFiles
    from pytest_sway.backends.hf.base import LoadedBase

__tracebackhide__ = True  # a failing test shows its own lines, not ours; pytest --full-trace shows all

_UNSEEN_FIELDS: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
)
"""Fields of a config that do not show in what PEFT makes of it."""


def attach(base: LoadedBase, files: AdapterFiles) -> Adapter:
    """Put an adapter on a model of its own, which shares the base's memory, and verify it.

    Raises:
        AdapterMismatchError: It does not fit the base, was not applied in full, is not finite, or does nothing.
        WeightsError: Its file of weights cannot be read.
        SpecError: PEFT does not take a field of its config.
    """
    with explained(base, files), quiet_process(), seeded(base.device):  # what starts at random does so alike each time
        adapter = _from_skeleton(base, files) or _by_peft(base, files)
    verify_values(base.spec, adapter)
    return adapter


@contextmanager
def explained(base: LoadedBase, files: AdapterFiles) -> Iterator[None]:
    """Have errors out of PEFT name the adapter's file and the field that they come from."""

    def attempt(folder: Path) -> None:
        import torch

        model = _loaded_again(base, with_entries(read_adapter(folder, allow_pickle=True)))
        with torch.inference_mode():
            model(torch.zeros((1, 2), dtype=torch.long, device=base.device))  # some fields matter only then

    try:
        yield
    except SwayError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise refused(base.spec, files, error, attempt) from error


# --- by PEFT ----------------------------------------------------------------------------------------------------------


def _by_peft(base: LoadedBase, files: AdapterFiles) -> Adapter:
    known: dict[int, Any] = {}
    peft_model = _loaded(base, files, known)
    ways = base.pristine.memory.settle(peft_model, known)
    named = [*peft_model.named_parameters(), *peft_model.named_buffers()]
    own = {name: tensor for name, tensor in named if id(tensor) not in ways}
    pristine = Pristine(
        peft_model, lambda: _loaded_again(base, files), ways=ways, own=own.values(), trial=base.may_hide_something
    )
    adapter = Adapter(files, pristine, own)
    if pristine.shares and _is_all_in_file(adapter):
        base.skeletons[_signature(files, peft_model.peft_config[NAME])] = Skeleton(pristine, own)
    return adapter


def _loaded(base: LoadedBase, files: AdapterFiles, known: dict[int, Any]) -> Any:
    """Do as ``PeftModel.from_pretrained`` does on a tree, and look at what it ignores: the keys that did not match.

    Args:
        base: The base.
        files: The adapter.
        known: By the identity of things in the base's model, what stands for them in the tree; it is filled.
    """
    import peft

    tree = base.pristine.tree(known, isolated=not files.plain)
    if files.vocabulary is not None and tree.get_input_embeddings().weight.shape[0] != files.vocabulary:
        tree.resize_token_embeddings(files.vocabulary, mean_resizing=False)
        tree.requires_grad_(False)
    config = _config(files)
    if hasattr(config, "progressbar"):
        config.progressbar = False  # FRoD draws one wherever the terminal is
    kind = peft.PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else peft.PeftModel
    peft_model: Any = kind(tree, config)
    starts = {} if files.plain or config.is_prompt_learning else _copies(adapter_parameters(peft_model))
    key_mapping = None if config.is_prompt_learning else getattr(tree, "_checkpoint_conversion_mapping", {})
    result = peft_model.load_adapter(str(files.folder), NAME, torch_device=str(base.device), key_mapping=key_mapping)
    verify_keys(base.spec, files, _unloaded(peft_model, result.missing_keys), result.unexpected_keys)
    peft_model.eval()
    peft_model.requires_grad_(False)
    verify_trained(base.spec, files, adapter_parameters(peft_model), starts)
    return peft_model


def _loaded_again(base: LoadedBase, files: AdapterFiles) -> Any:
    with quiet_process(), seeded(base.device):
        return _loaded(base, files, {})


def _config(files: AdapterFiles) -> Any:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    configs: dict[Any, Any] = {**PEFT_TYPE_TO_CONFIG_MAPPING}
    if files.peft_type not in configs:
        raise SpecError(
            f"the adapter {str(files.folder)!r} is of the type {shown(files.peft_type)} (peft_type in its {CONFIG}),"
            f" which the installed PEFT {peft.__version__} does not know. Upgrade PEFT."
        )
    config = configs[files.peft_type].from_pretrained(str(files.folder))
    config.inference_mode = True
    return config


def _copies(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _unloaded(peft_model: Any, missing: Iterable[str]) -> list[str]:
    """Of the names that the file had no tensor for, those whose parameter is not loaded under another name either."""
    places = dict(peft_model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in places.items() if name not in set(missing)}
    return [name for name in missing if id(places.get(name)) not in loaded]


# --- by a skeleton ----------------------------------------------------------------------------------------------------


class Skeleton:
    """What PEFT makes of a configuration, without weights.

    Args:
        pristine: The ``PeftModel`` with an adapter of this configuration.
        own: The adapter's tensors, which are all in its file, by their names in the ``PeftModel``.

    Attributes:
        model: The ``PeftModel``.
        places: By the names of an adapter's tensors in its file, what stands for them in the model: shape and dtype.
        names: By the same names, those that they have in the ``PeftModel``.
    """

    def __init__(self, pristine: Pristine, own: Mapping[str, Any]) -> None:
        import torch

        memory, known = pristine.memory, dict[int, Any]()
        for tensor in own.values():
            known[id(tensor)] = torch.nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
        self.places = {_in_file(name): known[id(tensor)] for name, tensor in own.items()}
        self.names = {_in_file(name): name for name in own}
        self.model = memory.tree(known)
        self._memory = SharedMemory(self.model, memory.ways_in(known))

    def tree(self, weights: Mapping[str, Any], config: Any) -> Any:
        """Return a ``PeftModel`` with the weights of an adapter.

        Args:
            weights: The tree's tensors, by their names in the file.
            config: The adapter's configuration.
        """
        tree = self._memory.tree({id(place): weights[name] for name, place in self.places.items()})
        tree.peft_config[NAME] = config
        return tree


class OnSkeleton:
    """What the trees of an adapter are made from, where there is a skeleton: that and the adapter's weights.

    Args:
        skeleton: The skeleton.
        config: The adapter's configuration.
        weights: The adapter's tensors, by their names in its file.

    Attributes:
        model: The ``PeftModel``, without weights.
        shares: Whether trees share the base's memory.
        watches: Watches over the adapter's tensors, wherever they are used.
    """

    shares = True

    def __init__(self, skeleton: Skeleton, config: Any, weights: dict[str, Any]) -> None:
        self.model = skeleton.model
        self.watches = Watches()
        self.watches.add(weights.values())
        self._skeleton = skeleton
        self._config = config
        self._weights = weights
        self._shared = SharedTensors(weights.values())

    def exposes(self, _name: str, tensor: Any) -> bool:
        """Whether all trees have the same memory of one of the adapter's tensors."""
        return self._shared.exposes(tensor)

    def tree(self) -> Any:
        """Return a ``PeftModel`` that is nobody else's."""
        ours = self._shared.shared(self._weights.values())
        self.watches.add(ours)
        return self._skeleton.tree(dict(zip(self._weights, ours, strict=True)), copy.deepcopy(self._config))


def _from_skeleton(base: LoadedBase, files: AdapterFiles) -> Adapter | None:
    """Put an adapter on as PEFT did with another one of its configuration; ``None`` if there was none.

    Raises:
        RuntimeError: A tensor's shape is not that of its place.
    """
    if files.peft_type != "LORA" or files.entries is None:
        return None
    config = _config(files)
    skeleton = base.skeletons.get(_signature(files, config))
    if skeleton is None or skeleton.places.keys() != files.entries.keys():
        return None
    tensors = _read_tensors(files, base)
    weights = {name: _parameter(tensors[name], place, base) for name, place in skeleton.places.items()}
    own = {skeleton.names[name]: parameter for name, parameter in weights.items()}
    return Adapter(files, OnSkeleton(skeleton, config, weights), own)


def _is_all_in_file(adapter: Adapter) -> bool:
    """Whether all that an adapter has of its own comes from its file, so that nothing depends on the base's weights."""
    files = adapter.files
    if files.peft_type != "LORA" or files.entries is None:
        return False
    return set(map(_in_file, adapter.own)) == files.entries.keys()


def _in_file(name: str) -> str:
    """The name of a tensor of the adapter in its file."""
    return name.replace(f".{NAME}", "")


def _signature(files: AdapterFiles, config: Any) -> str:
    """Equal for adapters of which PEFT makes the same, but for their weights."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _UNSEEN_FIELDS}
    fields["dtypes"] = sorted({entry.dtype for entry in (files.entries or {}).values()})
    return json.dumps(
        fields, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )


def _read_tensors(files: AdapterFiles, base: LoadedBase) -> dict[str, Any]:
    from safetensors.torch import load_file

    path, device = files.folder / WEIGHTS, str(base.device)
    return dict(load_file(str(path), device=device)) if path.is_file() else read_pickle(files, device)


def _parameter(tensor: Any, place: Any, base: LoadedBase) -> Any:
    import torch

    if tensor.shape != place.shape:
        raise RuntimeError(f"size mismatch: {tuple(tensor.shape)} in the file, {tuple(place.shape)} here.")
    return torch.nn.Parameter(tensor.to(base.device, place.dtype, copy=True), requires_grad=False)
