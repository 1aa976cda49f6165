"""The device of these tests, from ``SWAY_TEST_DEVICE`` (by default the CPU), and measurements of its memory."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

from pytest_sway.backends.hf.sharing.mapped_files import MappedFiles
from pytest_sway.backends.hf.sharing.tensor_memory import address_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_ASKED: Final = os.environ.get("SWAY_TEST_DEVICE") or "cpu"
DEVICE: Final = "cuda:0" if _ASKED == "cuda" else _ASKED
ON_CUDA: Final = DEVICE.startswith("cuda")

_BYTES_OF_A_POSITION: Final = 16
"""The approximate bytes of a pass on a CPU, per position and element of the hidden state."""


def require() -> None:
    """Fail if the requested device is not available."""
    import torch

    if ON_CUDA and not torch.cuda.is_available():
        raise RuntimeError(f"SWAY_TEST_DEVICE is {DEVICE}, but torch {torch.__version__} finds no CUDA device.")


def warm_up() -> None:
    """Make CUDA's libraries allocate their workspaces now, since these count as allocated memory."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        one = torch.ones(64, 64, device=DEVICE, dtype=dtype)
        torch.nn.functional.linear(one, one, one[0]).add_(one @ one).sum().item()
    synchronise()


def synchronise() -> None:
    import torch

    if ON_CUDA:
        torch.cuda.synchronize()


def allocated() -> int:
    """Return the bytes of all tensors on the device; shared memory counts once."""
    import torch

    if ON_CUDA:
        return int(torch.cuda.memory_allocated(DEVICE))
    files, places = MappedFiles(), dict[Any, int]()
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided and thing.device.type == "cpu":
            address, nbytes = address_of(thing), thing.untyped_storage().nbytes()
            part = files.part_of(address, nbytes)  # a file may be mapped several times
            place = address if part is None else (part.file.identity, part.start)
            places[place] = max(places.get(place, 0), nbytes)
    return sum(places.values())


class Peak:
    """The peak of allocated bytes since this was made; on a CPU, the bytes allocated now."""

    def __init__(self) -> None:
        import torch

        if ON_CUDA:
            torch.cuda.reset_peak_memory_stats(DEVICE)

    def nbytes(self) -> int:
        import torch

        return int(torch.cuda.max_memory_allocated(DEVICE)) if ON_CUDA else allocated()


@contextmanager
def short_of_memory(nbytes: int) -> Iterator[list[None]]:
    """Leave ``nbytes`` free inside the block, and yield a list that gets an item for each failed allocation.

    On a CPU, the memory is not filled. Instead, moving a model and starting a pass raise torch's error.

    Args:
        nbytes: The free bytes.
    """
    import torch

    gc.collect()
    failures: list[None] = []
    if ON_CUDA:
        torch.cuda.empty_cache()
        failed, total = _failures(), torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + nbytes) / total, DEVICE)
        try:
            yield failures
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
            failures += [None] * (_failures() - failed)
        return
    most = allocated() + nbytes
    to, embed = torch.nn.Module.to, torch.nn.Embedding.forward

    def fail() -> None:
        failures.append(None)
        raise torch.OutOfMemoryError("CUDA out of memory, as a test says.")

    def move(self: Any, *args: Any, **kwargs: Any) -> Any:
        return fail() if allocated() > most else to(self, *args, **kwargs)

    def begin(self: Any, ids: Any) -> Any:
        return fail() if ids.numel() * self.embedding_dim * _BYTES_OF_A_POSITION > nbytes else embed(self, ids)

    with patch.object(torch.nn.Module, "to", move), patch.object(torch.nn.Embedding, "forward", begin):
        yield failures


def _failures() -> int:
    import torch

    return int(torch.cuda.memory_stats(DEVICE)["num_ooms"])
