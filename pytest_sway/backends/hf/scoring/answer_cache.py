"""What a base has answered before: a question that is put to it again, whatever adapter is being tested, costs no pass.

What is remembered is a whole batch, under exactly what went through the model together. So a remembered number is, to
the bit, the one that the same call would compute, whatever was asked before.

Answers are copied, so that you may write into those of any view. That takes 0.1 ms for 16 distributions of 256 tokens.
A question is kept as its digest: its tokens would take ten times the memory of the answers.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial, wraps
from hashlib import blake2b
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from pytest_sway.backends.hf.scoring.engine import Engine

__tracebackhide__ = True


DEFAULT_BYTES: Final = 64 * 2**20

_ENTRY_BYTES: Final = 300
"""About what an entry takes besides its answers."""


class _Entry(NamedTuple):
    """What was answered: a copy, so that callers may change what they get."""

    answers: list[Any]
    seconds: float
    nbytes: int


class AnswerCache:
    """The latest answers of one base, up to a number of bytes.

    Args:
        max_bytes: The most bytes that it may take; what was not asked for longest goes first.
        on_recall: Called with how many answers were given from memory, and the seconds that they once took.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES, on_recall: Callable[[int, float], None] | None = None) -> None:
        from cachetools import LRUCache

        self._on_recall = on_recall
        self._entries: LRUCache[bytes, _Entry] = LRUCache(max_bytes, getsizeof=lambda entry: entry.nbytes)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return int(self._entries.currsize)

    def __len__(self) -> int:
        return len(self._entries)

    def answers(self, question: Hashable, compute: Callable[[], list[Any]]) -> list[Any]:
        """Return the answers to ``question``, from ``compute()`` where they are not known yet.

        Args:
            question: All that the answers depend on, made of tuples, texts and numbers.
            compute: Returns the answers.
        """
        key = blake2b(repr(question).encode(), digest_size=20).digest()
        with self._lock:
            entry = self._entries.get(key)
        if entry is None:
            started = time.perf_counter()
            answers = compute()
            seconds = time.perf_counter() - started
            entry = _Entry(copy.deepcopy(answers), seconds, _size(answers) + _ENTRY_BYTES)
            with self._lock, suppress(ValueError):  # larger than all of it
                self._entries[key] = entry
            return answers
        recalled = copy.deepcopy(entry.answers)
        if self._on_recall is not None:
            self._on_recall(len(recalled), entry.seconds)
        return recalled

    def forget(self) -> None:
        """Drop all of it."""
        with self._lock:
            self._entries.clear()


def _size(value: Any) -> int:
    """About how many bytes an answer takes."""
    if isinstance(value, list | tuple):
        return sys.getsizeof(value) + sum(map(_size, value))
    if is_dataclass(value):
        return sys.getsizeof(value) + sum(_size(getattr(value, field.name)) for field in fields(value))
    # Python counts an array's contents only where they are its own.
    return sys.getsizeof(value) + int(getattr(value, "nbytes", 0))


def recalling(work: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Have the answers of ``work(engine, batch, *args)`` taken from the engine's memory, if it has one and knows them.

    They may depend on the engine's model, the batch and ``args`` only.
    """

    @wraps(work)
    def recalled(engine: Engine, batch: Sequence[Any], *args: Any) -> list[Any]:
        compute = partial(work, engine, batch, *args)
        if engine.recall is None:
            return compute()
        return engine.recall((work.__name__, tuple(batch), args), compute)

    return recalled


def circumstances(device_type: str) -> tuple[Any, ...] | None:
    """Return the settings of torch that a model's numbers depend on, as they are now.

    Args:
        device_type: Where the model is, such as ``cpu``.

    Returns:
        The settings; ``None`` while somebody watches what torch computes, and would miss what is not computed.
    """
    import torch

    if _watched():
        return None
    cuda: Any = torch.backends.cuda
    mkldnn: Any = torch.backends.mkldnn
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.are_deterministic_algorithms_enabled(),
        _float32_precision(),
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        mkldnn.enabled,
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


def _float32_precision() -> tuple[Any, ...]:
    """In what matrices of float32 are multiplied, by whichever of torch's settings."""
    import torch

    parts: list[Any] = [torch.backends.mkldnn, torch.backends.cuda.matmul]
    parts.append(getattr(torch.backends.mkldnn, "matmul", None))
    told = [getattr(part, "fp32_precision", None) for part in parts]  # since torch 2.9
    with suppress(RuntimeError):  # it does not tell once one of those was set
        told.append(torch._C._get_float32_matmul_precision())
    return tuple(told)


def _watched() -> bool:
    """Whether hooks on all modules, modes around all operations or a profiler are on."""
    import torch

    modules: Any = import_module("torch.nn.modules.module")
    return bool(
        modules._has_any_global_hook()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
    )
