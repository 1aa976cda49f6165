"""Remembers the results of trials in the user's cache folder, so that one model is tried once on a machine.

A file is named by a digest of all that the results depend on: the model's configuration and a sample of its weights,
the device, torch's settings of precision, and the versions of the libraries. Where the model came from does not count.
A model with code or layers of its own is tried in each run: its configuration does not say what it computes.
"""

from __future__ import annotations

import json
import sys
import weakref
from hashlib import blake2b
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.hygiene.contents import alike, home_of, sample_of
from pytest_sway.backends.hf.model.skeletons import inner_model
from pytest_sway.backends.hf.scoring.answer_cache import precision
from pytest_sway.backends.hf.sharing.tensor_parts import is_wrapper
from pytest_sway.backends.hf.sharing.trees import modules_of, tensors_of
from pytest_sway.backends.local.user_cache import read_small, user_cache, write_small

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pytest_sway.backends.hf.scoring.trials import Trials

__tracebackhide__ = True

_FORMAT: Final = 3
"""Raise it when a trial or a pass changes, so that results of older versions are not used."""

_KNOWN: Final = frozenset({"torch", "transformers", "peft"})
"""The packages whose code has the versions in the key."""

_UNSEEN_FIELDS: Final = frozenset(
    {"_name_or_path", "name_or_path", "base_model_name_or_path", "revision", "transformers_version"}
)
_MOST_FILES: Final = 256
_FILE_BYTES: Final = 2**16


class TrialFile:
    """The file with one model's results.

    Args:
        model: The model, or the ``PeftModel`` around it, whose weights are not changed.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._path: Path | None = None
        self._precision: Any = None
        self._record: dict[str, Any] | None = None
        """What the file says; ``None`` if it was not read yet."""

    def recall(self, trials: Trials) -> None:
        """Take over the results of earlier runs, at the first call."""
        if self._record is not None:
            return
        self._record = {}
        model, folder = self._model(), user_cache()
        if model is None or folder is None:
            return
        self._precision = precision(model.device.type)
        identity = None if self._precision is None else identity_of(model, self._precision)
        if identity is None:
            return
        self._path = folder / "trials" / f"{identity}.json"
        found = read_small(self._path, _FILE_BYTES)
        if found is not None and _fill(trials, found, model):
            self._record = _record_of(trials)

    def remember(self, trials: Trials) -> None:
        """Write new results. If torch's precision has changed meanwhile, nothing is written from then on."""
        if self._path is None or (record := _record_of(trials)) == self._record:
            return
        model = self._model()
        if model is None or precision(model.device.type) != self._precision:
            self._path = None
            return
        self._record = record
        write_small(self._path, json.dumps(record).encode(), _MOST_FILES)


# --- what the results depend on ---------------------------------------------------------------------------------------


def identity_of(model: Any, settings: Any) -> str | None:
    """Return a digest of all that trials of a model depend on; ``None`` if it has code of its own.

    Args:
        model: The model.
        settings: The settings of torch, see `precision`.
    """
    tensors = [tensor for tensor in tensors_of(model) if not tensor.is_meta]  # a skeleton lacks its adapter's
    if any(map(is_wrapper, tensors)) or not all(map(_is_known, (module for _, module in modules_of(model)))):
        return None
    own = _configs_of_parts(model)
    if not all(_is_known_attention(config._attn_implementation) for config in own):
        return None
    chosen = [{name: value for name, value in vars(config).items() if "implementation" in name} for config in own]
    configs = [model.config, *getattr(model, "peft_config", {}).values()]
    parts = [
        _FORMAT,
        type(model).__qualname__,
        [_plain(config.to_dict()) for config in configs],
        [chosen, str(model.dtype), _device_name(model.device), settings],
        [sys.platform, sys.version_info[:2], *map(_version, sorted(_KNOWN))],
    ]
    digest = blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=20)
    for content in _sampled(tensors):
        digest.update(content)
    return digest.hexdigest()


def _configs_of_parts(model: Any) -> list[Any]:
    """Return the configurations of a model's parts; a multimodal model's text has a choice of attention of its own."""
    found = (getattr(module, "config", None) for _, module in modules_of(model))
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


def _is_known(module: Any) -> bool:
    """Return whether only code of the libraries computes a module: no other class, hook or replaced ``forward``."""
    kind = type(module)
    if "forward" in vars(module) or not (_is_of_libraries(kind.__module__) and _is_of_libraries(home_of(kind.forward))):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def _is_of_libraries(module: str) -> bool:
    return module.partition(".")[0] in _KNOWN


def _is_known_attention(name: Any) -> bool:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known: Any = ALL_ATTENTION_FUNCTIONS
    return name in (None, "eager") or getattr(known.get(name), "__module__", "").startswith("transformers.")


def _plain(value: Any) -> Any:
    """Return a configuration without the fields that say where a model came from."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items() if name not in _UNSEEN_FIELDS}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"  # which kernels compute on a CPU


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _sampled(tensors: Iterable[Any]) -> list[bytes]:
    """Return a number of each tensor."""
    import torch

    groups = alike([sample_of(tensor)[:1] for tensor in tensors if tensor.numel()])
    return [torch.cat(group).cpu().numpy().tobytes() for group in groups]


# --- the record -------------------------------------------------------------------------------------------------------


def _record_of(trials: Trials) -> dict[str, Any]:
    kind = trials.output_class
    return {
        "divides": trials.divides,
        "body": trials.body,
        "output_class": None if kind is None else [kind.__module__, kind.__qualname__],
        "divides_words": trials.divides_words,
        "longest_packed": trials.longest_packed,
        "caches": trials.caches,
        # A copy, since another thread may add to it.
        "continues": sorted([list(lengths), does] for lengths, does in trials.continues.copy().items()),
    }


def _fill(trials: Trials, content: bytes, model: Any) -> bool:
    """Fill in what a file says, and return whether it can be read."""
    try:
        record = json.loads(content)
        kind = None if record["output_class"] is None else _class(*record["output_class"])
        continues = {tuple(map(_number, lengths)): bool(does) for lengths, does in record["continues"]}
        divides, words, caches = record["divides"], record["divides_words"], record["caches"]
        longest = record["longest_packed"]
        body = str(record["body"])
        if divides:
            inner_model(model).get_submodule(body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False
    if {type(divides), type(words), type(caches)} - {bool, type(None)} or type(longest) not in (int, type(None)):
        return False
    if bool(divides) != (kind is not None):
        return False
    trials.body, trials.output_class, trials.divides = body, kind, divides  # in this order, for other threads
    trials.divides_words, trials.longest_packed, trials.caches = words, longest, caches
    trials.continues.update(continues)
    return True


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value


def _class(module: str, name: str) -> type:
    """Return a class of transformers' outputs.

    Raises:
        ValueError: It is none.
    """
    outputs: Any = import_module("transformers.utils")
    found = getattr(sys.modules.get(module), name, None)
    if not (module.startswith("transformers.") and isinstance(found, type) and issubclass(found, outputs.ModelOutput)):
        raise ValueError(f"{module}.{name} is no output of a model")
    return found
