"""Resolve devices and dtypes for MLX, and translate them to MLX's own."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.errors import SpecError
from pytest_sway.system.imports import import_apart

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True

_GPU_NAMES: Final = ("gpu", "mps", "cuda")
"""All mean a GPU: MLX has one name for every make, and torch's names are understood."""

_ONE_AT_A_TIME: Final = threading.RLock()
_in_use: Final[set[str]] = set()


def resolve_placement(spec: ModelSpec) -> ModelSpec:
    """Return ``spec`` with the device and dtype that ``auto`` stands for on this machine.

    The device is the GPU if MLX has one, else the CPU. The dtype is fp32 on a CPU and bf16 on a GPU. Without mlx, the
    spec is returned unchanged, and the load says what is missing.
    """
    name, _, number = spec.device.partition(":")
    device = f"gpu:{number or 0}" if name in _GPU_NAMES else spec.device
    try:
        device = _best_device() if device == "auto" else device
    except ImportError:
        return spec
    dtype = spec.dtype if spec.dtype != "auto" else "fp32" if device == "cpu" else "bf16"
    return spec if (device, dtype) == (spec.device, spec.dtype) else replace(spec, device=device, dtype=dtype)


def require_device(spec: ModelSpec) -> None:
    """Require that the device of a resolved spec exists.

    Raises:
        SpecError: It does not.
    """
    import_apart("mlx.core")
    import mlx.core as mx

    there = ["cpu", *(f"gpu:{i}" for i in range(mx.device_count(mx.gpu)))]
    if spec.device not in there:
        raise SpecError(
            f"MLX has no device {spec.device!r} here; it has {', '.join(there)}. Use 'auto' for the best one, or 'cpu'."
        )


def mlx_device(spec: ModelSpec) -> Any:
    """Return MLX's device of a resolved spec."""
    import mlx.core as mx

    name, _, number = spec.device.partition(":")
    return mx.Device(mx.gpu if name == "gpu" else mx.cpu, int(number or 0))


def mlx_dtype(spec: ModelSpec) -> Any:
    """Return MLX's dtype of a resolved spec."""
    import mlx.core as mx

    return {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32}[spec.dtype]


@contextmanager
def computing_on(device: Any) -> Iterator[None]:
    """Make MLX compute on a device inside the block.

    Threads compute in parallel as long as all use MLX's default device. The default device belongs to the whole
    process; everything else in MLX that matters here belongs to a thread. So once a second device was used, only one
    thread computes at a time: otherwise it would compute on another thread's device.
    """
    import mlx.core as mx

    _in_use.update((_default_device(), str(device)))
    with _ONE_AT_A_TIME if len(_in_use) > 1 else nullcontext(), mx.stream(device):
        yield


@lru_cache(maxsize=1)
def _default_device() -> str:
    """MLX's default device before any other was set."""
    import mlx.core as mx

    return str(mx.default_device())


@lru_cache(maxsize=1)
def _best_device() -> str:
    import_apart("mlx.core")
    import mlx.core as mx

    return "gpu:0" if mx.is_available(mx.gpu) else "cpu"
