"""Checks a spec before anything is loaded, or evicted to make room for it."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.bounds import require_base_bounded, require_bounded, require_files
from pytest_sway.backends.checkpoints.gguf_header import gguf_file, read_gguf
from pytest_sway.backends.checkpoints.hub_files import (
    adapter_inside,
    base_file,
    config_of,
    require_another,
    require_cached,
)
from pytest_sway.backends.checkpoints.lora_fit import check_fit, require_task
from pytest_sway.backends.checkpoints.peft_adapter import CONFIG as ADAPTER_CONFIG
from pytest_sway.backends.checkpoints.peft_adapter import read_adapter, require_mergeable
from pytest_sway.backends.checkpoints.plan import ModelFiles, Plan
from pytest_sway.backends.checkpoints.sizes import base_entries, estimated
from pytest_sway.backends.hf.adapters.verify.head import require_head, with_labels
from pytest_sway.backends.hf.loading.libraries import require_libraries, require_package
from pytest_sway.backends.hf.loading.placement import require_device
from pytest_sway.errors import AdapterMismatchError, SpecError, WeightsError
from pytest_sway.spec.identity import base_spec, finetuned_spec, merged_spec, resolved_key, state_of_files
from pytest_sway.spec.model_kwargs import as_mapping, unpacks
from pytest_sway.spec.paths import is_path
from pytest_sway.spec.tasks import is_causal

if TYPE_CHECKING:
    from pytest_sway.backends.checkpoints.peft_adapter import AdapterFiles
    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_OF_TOKENIZER: Final = re.compile(r"token|vocab|merges|bpe|spm|spiece|\.(model|tiktoken|txt)$|\.py$")
"""Matches the names of files from which some model's tokenizer is made."""


def check_spec(spec: ModelSpec) -> Plan:
    """Check the files of a resolved spec and return the plan for its load.

    Args:
        spec: The resolved spec.

    Raises:
        SpecError: The folder of the base, the adapter or the fine-tuned model is missing or of the wrong kind; a
            model's folder holds an adapter; the fine-tuned model is the base; or the device is not available.
        WeightsError: Weights are missing, broken, or only stored as a pickle that the spec does not allow; or a model
            must be downloaded and the process is offline.
        AdapterMismatchError: The adapter was made for another architecture.
        BackendNotAvailableError: torch, transformers, PEFT or safetensors is not installed.
    """
    state = state_of_files(spec)
    asked, spec = spec, with_labels(spec)
    models = [_check_model(base_spec(spec), "base")]
    tuned = finetuned_spec(spec)
    if tuned is not None:
        require_another(spec, tuned)
        models.append(_check_model(tuned, "fine-tuned model"))
    adapters = [_check_adapter(models[-1], Path(adapter), spec) for adapter in spec.adapters]
    require_head(models[-1], adapters)
    merged = merged_spec(spec)
    if merged is not None:
        models.append(_merged(models[-1], merged, adapters[:-1]))
    require_libraries(spec, gguf=any(model.gguf is not None for model in models))
    for model in models:
        require_package(model.spec, model.config)
    require_device(spec)
    require_cached(spec)
    if tuned is not None:
        require_cached(tuned, "fine-tuned model")
    files = adapters[-1] if adapters else None
    plan = Plan(spec, resolved_key(asked), state, files, tuple(models))  # after the checks: the key digests the files
    return replace(plan, sizes=estimated(plan))


def _check_adapter(base: ModelFiles, folder: Path, spec: ModelSpec) -> AdapterFiles:
    require_files(folder)
    files = read_adapter(folder, allow_pickle=spec.allow_pickle)
    require_fit(base, files)
    _require_layers(base)
    return files


def _merged(model: ModelFiles, spec: ModelSpec, adapters: list[AdapterFiles]) -> ModelFiles:
    """Return the model that the last adapter is put on: ``model`` with the other adapters merged into it.

    Args:
        model: The base or the fine-tuned model.
        spec: Its spec, with the adapters.
        adapters: These adapters.
    """
    for number, files in enumerate(adapters, start=1):
        require_mergeable(files, number)
    return replace(model, key=("merged", *resolved_key(spec)), merged=tuple(adapters))


def require_fit(base: ModelFiles, files: AdapterFiles) -> None:
    """Raise if the file headers show that an adapter does not fit its base, or that loading it could take for ever.

    Args:
        base: The base's files.
        files: The adapter's files.

    Raises:
        SpecError: A regular expression in the adapter's config could backtrack without end.
        AdapterMismatchError: The adapter does not fit the base, or its own weights, or was trained for another task.
    """
    require_bounded(files, base.entries)
    require_task(files, "hf", base.spec.task)
    if base.entries is not None:
        check_fit(base.spec, files, base.entries, base.config)


def _require_layers(base: ModelFiles) -> None:
    """Raise if a base is packed so that PEFT finds no weights in its layers.

    Raises:
        AdapterMismatchError: It is.
    """
    stored = base.config.get("quantization_config")
    if not isinstance(stored, dict) or stored.get("format") != "pack-quantized" or unpacks(base.spec.model_kwargs):
        return
    raise AdapterMismatchError(
        f"the base {base.spec.base!r} is packed by compressed-tensors, and PEFT puts no adapter on packed layers. Have"
        " it unpacked on load: model_kwargs={'quantization_config': {'quant_method': 'compressed-tensors',"
        " 'run_compressed': False}}, or 'dequantize': True where transformers knows that."
    )


def _check_model(spec: ModelSpec, role: str) -> ModelFiles:
    """Check and read the files of a base or fine-tuned model; ``role`` names the model in errors."""
    if is_path(spec.base):
        require_files(Path(spec.base))
    gguf = gguf_file(spec)
    if gguf is not None and not is_causal(spec.task):
        raise SpecError(
            f"the {role} {spec.base!r} is a GGUF file, of a causal language model, so it has no task={spec.task!r}."
            " Name the folder of a model in safetensors."
        )
    header = None if gguf is None else read_gguf(gguf)
    if gguf is None and is_path(spec.base):
        _check_folder(spec, role)
    if base_file(spec, ADAPTER_CONFIG) is not None:
        raise adapter_inside(spec, role)
    if gguf is not None and "quantization_config" in as_mapping(spec.model_kwargs):
        raise SpecError(
            f"the {role} {spec.base!r} is a GGUF file, which is unpacked into the spec's dtype and not quantized again."
            " Take 'quantization_config' out of model_kwargs, or name the folder of a model."
        )
    config = _config(spec, role)
    path, entries = base_file(spec, "config.json"), None if gguf is not None else base_entries(spec)
    if path is not None and entries is not None:
        require_base_bounded(path, config, entries)
    return ModelFiles(spec, resolved_key(spec), config, entries, header)


def _check_folder(spec: ModelSpec, role: str) -> None:
    folder = Path(spec.base)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise SpecError(
            f"the {role} {spec.base!r} {what}. Name a hub id (org/name), the folder of a model, or a .gguf file."
        )
    if not (folder / "config.json").is_file():
        hint = " It holds an adapter; name it as 'adapter'." if (folder / ADAPTER_CONFIG).is_file() else ""
        raise SpecError(f"the {role} {spec.base!r} has no config.json, so it is not the folder of a model.{hint}")
    if not any(_OF_TOKENIZER.search(path.name) for path in folder.iterdir()):
        raise SpecError(
            f"the {role} {spec.base!r} has no tokenizer (tokenizer.json or the like); a model's save_pretrained writes"
            f" none. Save it there: AutoTokenizer.from_pretrained(...).save_pretrained({spec.base!r})."
        )
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    if not any(folder.glob("pytorch_model*.bin*")):
        raise WeightsError(f"the {role} {spec.base!r} has no weights: expected model.safetensors in it.")
    if not spec.allow_pickle:
        raise WeightsError(
            f"the {role} {spec.base!r} has its weights only as a pickle (pytorch_model.bin), which can run code when it"
            " is read. Convert it to safetensors, or set allow_pickle=True in the spec if you trust it."
        )


def _config(spec: ModelSpec, role: str) -> dict[str, Any]:
    """Return the model's config, empty if it is not on this machine; raise if it needs code that the spec forbids."""
    config = config_of(spec)
    if config.get("auto_map") and not spec.trust_remote_code and not _is_known_type(config):
        raise SpecError(
            f"the {role} {spec.base!r} brings its own code (auto_map in its config.json), and the spec does not allow"
            " it to run. Read that code, then set trust_remote_code=True in the spec."
        )
    return config


def _is_known_type(config: dict[str, Any]) -> bool:
    """Return whether transformers knows the model's type, so that the base's own code is not needed."""
    try:
        known: Any = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    except ImportError:
        return True
    return config.get("model_type") in known
