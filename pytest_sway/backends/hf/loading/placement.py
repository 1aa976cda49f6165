"""What ``auto`` means: the device and the dtype that a spec will really be loaded with."""

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
    """Return ``spec`` with the device and dtype that ``auto`` stands for on this machine.

    The device is the current CUDA device, else MPS, else the CPU. Where several workers share a machine with several
    CUDA devices, each takes its turn among those that are visible, unless code has chosen a current device. The dtype
    is dlm-sway's choice for the device: bf16 where a CUDA device computes in it, fp16 on MPS, fp32 otherwise. Without
    torch the spec is returned as it is, and loading it will say what is missing.

    Args:
        spec: Any spec of kind ``hf``. One that has nothing to resolve is returned without importing torch.
    """
    if spec.device not in ("auto", "cuda") and spec.dtype != "auto":
        return spec
    try:
        return _resolved(spec)
    except ImportError:
        return spec


def require_device(spec: ModelSpec) -> None:
    """Make sure that the device of a resolved spec is there.

    Raises:
        SpecError: It is not.
    """
    if spec.device == "cpu":
        return
    import_apart("torch")
    import torch

    try:
        torch.empty(0, device=spec.device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].rstrip(".")
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

        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return "fp16" if device_type == "mps" else "fp32"
