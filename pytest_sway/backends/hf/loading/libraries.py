"""The boundary to torch, transformers and PEFT: their import, their noise, and what they change process-wide."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.hub_files import base_file
from pytest_sway.backends.libraries.process import PROCESS_STATE, quiet_libraries
from pytest_sway.errors import BackendNotAvailableError
from pytest_sway.system.imports import import_apart
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

REQUIRED: Final = ("torch", "transformers", "peft", "safetensors", "cachetools")

_PARTS: Final = (
    "safetensors.torch", "transformers.generation.utils", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)  # fmt: skip
"""What transformers imports when it is first asked for it, and every load asks for."""


def require_libraries(spec: ModelSpec, *, gguf: bool = False) -> None:
    """Raise unless everything that the ``hf`` kind needs is installed; import nothing.

    Args:
        spec: What is to be loaded.
        gguf: Whether it is read from a GGUF file.

    Raises:
        BackendNotAvailableError: Something is missing; the message has the line that installs it.
    """
    needed = (*REQUIRED, "gguf") if gguf else REQUIRED
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise BackendNotAvailableError(
            f"loading {spec} needs {', '.join(missing)}, which this environment lacks."
            f" Install them with: pip install 'pytest-sway[{'hf,gguf' if gguf else 'hf'}]'"
        )


def import_libraries(*specs: ModelSpec) -> None:
    """Import what loading these needs, the modules of their models included, so that the loads are timed without."""
    import_apart(*REQUIRED, *_PARTS)
    names: Any = import_module("transformers.models.auto.configuration_auto")
    for spec in specs:
        with suppress(Exception):  # the load itself will say what is wrong
            model_type = json.loads(read_bounded(base_file(spec, "config.json") or "", CONFIG_BYTES))["model_type"]
            module = names.model_type_to_module_name(model_type)
            if model_type in names.CONFIG_MAPPING_NAMES:
                import_apart(f"transformers.models.{module}.modeling_{module}")


@contextmanager
def quiet_process() -> Iterator[None]:
    """Run library code that warns, logs, draws progress bars or uses the random state, without a trace of it.

    Serialised over the process, since all of that is process-wide; everything is put back on the way out.
    """
    import torch

    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        yield


@contextmanager
def seeded(device: Any, seed: int = 0) -> Iterator[None]:
    """Run library code that draws random numbers from ``seed`` on; the state of the process and the device comes back.

    Args:
        device: The ``torch.device`` that it computes on.
        seed: Where the numbers start.
    """
    import torch

    with PROCESS_STATE, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def forget_layers() -> None:
    """Have PEFT forget the layers that it has warned about, of which some types keep every one for ever."""
    for name in ("shira", "supertuning"):
        module: Any = sys.modules.get(f"peft.tuners.{name}.layer")
        remembered: Any = getattr(module, "_warn_once_about_module_hooks", None)
        if remembered is not None:
            remembered.cache_clear()


def torch_dtype(name: str) -> Any:
    """Return the ``torch.dtype`` of a spec's resolved dtype."""
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
