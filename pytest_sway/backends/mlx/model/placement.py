"""What device and dtype ``auto`` stands for with MLX, and what MLX calls them."""

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
"""For MLX a GPU is a GPU, whichever its make; torch's names for it are understood."""

_ONE_AT_A_TIME: Final = threading.RLock()
_in_use: Final[set[str]] = set()


def resolve_placement(spec: ModelSpec) -> ModelSpec:
    """Return ``spec`` with the device and dtype that ``auto`` stands for on this machine.

    The device is the GPU if MLX has one, else the CPU. The dtype is fp32 on a CPU and bf16 on a GPU. Without mlx the
    spec is returned as it is, and loading it will say what is missing.
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
    """Make sure that the device of a resolved spec is there.

    Raises:
        SpecError: It is not.
    """
    import_apart("mlx.core")
    import mlx.core as mx

    there = ["cpu", *(f"gpu:{i}" for i in range(mx.device_count(mx.gpu)))]
    if spec.device not in there:
        raise SpecError(
            f"MLX has no device {spec.device!r} here; it has {', '.join(there)}. Ask for 'auto' (the best there is) or"
            " 'cpu'."
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
    """Have MLX compute on a device inside the block.

    Threads compute at the same time as long as all of them mean MLX's default device. The default device is the whole
    process's, while all else in MLX that matters here is each thread's own. So from when a second device has been used,
    one thread computes at a time: it would take the other thread's device instead of its own.
    """
    import mlx.core as mx

    _in_use.update((_default_device(), str(device)))
    with _ONE_AT_A_TIME if len(_in_use) > 1 else nullcontext(), mx.stream(device):
        yield


@lru_cache(maxsize=1)
def _default_device() -> str:
    """MLX's default device before any other was put in its place."""
    import mlx.core as mx

    return str(mx.default_device())


@lru_cache(maxsize=1)
def _best_device() -> str:
    import_apart("mlx.core")
    import mlx.core as mx

    return "gpu:0" if mx.is_available(mx.gpu) else "cpu"
