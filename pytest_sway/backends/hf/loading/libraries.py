"""Imports torch, transformers and PEFT, and keeps their output and process-wide changes away from tests."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.backends.libraries.process import PROCESS_STATE, quiet_libraries
from pytest_sway.errors import BackendNotAvailableError
from pytest_sway.spec.model_kwargs import method_of, quantization_of
from pytest_sway.system.imports import import_apart
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

REQUIRED: Final = ("torch", "transformers", "peft", "safetensors", "cachetools")

_QUANTIZERS: Final = {
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
}
"""The modules that each method imports; what others import depends on the version of transformers."""

_PARTS: Final = (
    "safetensors.torch", "transformers.generation.utils", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)  # fmt: skip
"""Modules that these libraries import lazily, and that every load needs."""


def require_libraries(spec: ModelSpec, *, gguf: bool = False) -> None:
    """Raise unless everything that kind ``hf`` needs is installed. This imports nothing.

    Args:
        spec: The spec to load.
        gguf: Whether the base or the fine-tuned model is a GGUF file.

    Raises:
        BackendNotAvailableError: A package is missing; the message has the command that installs it.
    """
    needed = (*REQUIRED, "gguf") if gguf else REQUIRED
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise BackendNotAvailableError(
            f"loading {spec} needs {', '.join(missing)}, which this environment lacks."
            f" Install them with: pip install 'pytest-sway[{'hf,gguf' if gguf else 'hf'}]'"
        )


def require_package(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Raise if a quantized model needs a package that is not installed. This imports nothing.

    Raises:
        BackendNotAvailableError: It does; the message has the command that installs it.
    """
    quantization = quantization_of(spec.model_kwargs, config)
    method = "" if quantization is None else method_of(quantization)
    missing = [name for name in _QUANTIZERS.get(method, ()) if find_spec(name) is None]
    if "gptqmodel" in missing and version("transformers").startswith("4."):
        return  # it takes other packages, and names them itself
    if missing:
        packages = [name.replace("_", "-") for name in missing]
        raise BackendNotAvailableError(
            f"the model {spec.base!r} is quantized by {method}, for which this environment lacks"
            f" {' and '.join(packages)}. Install what is missing with: pip install {' '.join(packages)}"
        )


def import_libraries(*specs: ModelSpec, adapter: bool) -> None:
    """Import what a load needs, with the code of its models, so that load times exclude imports.

    Args:
        specs: The specs of the models.
        adapter: Whether an adapter is put on one of them.
    """
    needed = REQUIRED if adapter else tuple(name for name in REQUIRED if name != "peft")
    import_apart(*needed, *_PARTS)
    names: Any = import_module("transformers.models.auto.configuration_auto")
    for spec in specs:
        with suppress(Exception):  # the load itself will say what is wrong
            model_type = json.loads(read_bounded(base_file(spec, "config.json") or "", CONFIG_BYTES))["model_type"]
            module = names.model_type_to_module_name(model_type)
            if model_type in names.CONFIG_MAPPING_NAMES:
                import_apart(f"transformers.models.{module}.modeling_{module}")


@contextmanager
def quiet_process() -> Iterator[None]:
    """Run library code without its warnings, logs and progress bars, and restore the random state at the end.

    These settings are process-wide, so one thread at a time runs this.
    """
    import torch

    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def seeded(device: Any, seed: int = 0) -> Iterator[None]:
    """Run library code with seeded random numbers, and restore the random state of the CPU and the device at the end.

    Args:
        device: The ``torch.device`` that the code computes on.
        seed: The seed.
    """
    import torch

    with PROCESS_STATE, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def forget_layers() -> None:
    """Clear PEFT's caches of layers that it has warned about; some keep every layer alive for ever."""
    for name in ("shira", "supertuning"):
        module: Any = sys.modules.get(f"peft.tuners.{name}.layer")
        remembered: Any = getattr(module, "_warn_once_about_module_hooks", None)
        if remembered is not None:
            remembered.cache_clear()


def torch_dtype(name: str) -> Any:
    """Return the ``torch.dtype`` of a spec's resolved dtype."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
