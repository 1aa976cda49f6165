"""Resolves ``auto``: chooses the device and the dtype that a spec is loaded with."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from pytest_sway.errors import SpecError
from pytest_sway.system.imports import import_apart
from pytest_sway.system.machine import worker_slot

if TYPE_CHECKING:
    from pytest_sway.spec.model_spec import Dtype, ModelSpec

__tracebackhide__ = True


def resolve_placement(spec: ModelSpec) -> ModelSpec:
    """Return ``spec`` with the device and dtype that ``auto`` means on this machine.

    The device is the current CUDA device, else MPS, else the CPU. If a machine has several CUDA devices, workers take
    turns among the visible ones, unless code has set a current device. The dtype is bf16 on a CUDA device that computes
    in it, fp16 on MPS, fp32 otherwise. That is dlm-sway's choice, except that dlm-sway also takes bf16 where a device
    only emulates it, such as a T4. Without torch, the spec is returned unchanged, and its load reports what is missing.

    Args:
        spec: Any spec of kind ``hf``. If nothing is to be resolved, torch is not imported.
    """
    if spec.device not in ("auto", "cuda") and spec.dtype != "auto":
        return spec
    try:
        return _resolved(spec)
    except ImportError:
        return spec


def require_device(spec: ModelSpec) -> None:
    """Raise if the device of a resolved spec cannot be used.

    Raises:
        SpecError: torch cannot allocate memory on it.
    """
    if spec.device == "cpu":
        return
    import_apart("torch")
    import torch

    try:
        torch.empty(0, device=spec.device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")  # the rest is torch's list of backends
        raise SpecError(
            f"the device {spec.device!r} cannot be used here: {why}. Ask for 'auto' (the best there is) or 'cpu'."
        ) from None


@lru_cache(maxsize=256)
def _resolved(spec: ModelSpec) -> ModelSpec:
    device = _device(spec.device)
    dtype = _dtype(device.partition(":")[0]) if spec.dtype == "auto" else spec.dtype
    return replace(spec, device=device, dtype=dtype)


def _device(asked: str) -> str:
    if asked not in ("auto", "cuda"):
        return asked
    import_apart("torch")
    import torch

    if torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device() or worker_slot() % max(1, torch.cuda.device_count())}"
    if asked == "cuda":
        return asked
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(device_type: str) -> Dtype:
    if device_type == "cuda":
        import_apart("torch")
        import torch

        usable = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if usable else "fp32"
    return "fp16" if device_type == "mps" else "fp32"
