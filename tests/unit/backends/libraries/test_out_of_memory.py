"""Out-of-memory errors of all libraries are recognised."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable

import pytest

from pytest_sway.backends.libraries.out_of_memory import out_of_memory
from pytest_sway.backends.registry import Builder
from pytest_sway.errors import BackendLoadError

SAYINGS = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 1 GB)",
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    "unable to mmap 538 bytes from file <model.safetensors>: Cannot allocate memory (12)",
    "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed buffer size",
    "[malloc_or_wait] Unable to allocate 99 bytes.",
    "std::bad_alloc",
]


@pytest.mark.parametrize("saying", SAYINGS)
def test_every_kind_knows_what_any_library_says(saying: str) -> None:
    assert out_of_memory(RuntimeError(saying))
    assert Builder().exhausted(RuntimeError(saying))


def _safetensors() -> Exception:
    from safetensors import SafetensorError

    return SafetensorError("Error while mapping: Cannot allocate memory (os error 12)")


def _torch() -> Exception:
    import torch

    return torch.OutOfMemoryError("full")


def _numpy() -> Exception:
    import numpy

    with pytest.raises(MemoryError) as caught:
        numpy.empty(2**60, numpy.uint8)
    return caught.value


@pytest.mark.parametrize(
    "make", [MemoryError, lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), _safetensors, _torch, _numpy]
)
def test_the_classes_of_libraries_say_so(make: Callable[[], Exception]) -> None:
    assert out_of_memory(make())


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),
        OSError(errno.ENOENT, "the model ran out of memory"),
        RuntimeError("shapes cannot be multiplied"),
        BackendLoadError("out of memory"),
        KeyboardInterrupt("out of memory"),
    ],
)
def test_other_errors_do_not(error: BaseException) -> None:
    assert not out_of_memory(error)


def test_to_know_it_imports_nothing() -> None:
    code = (
        "import sys; from pytest_sway.backends.libraries.out_of_memory import out_of_memory;"
        " assert out_of_memory(RuntimeError('out of memory')); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
