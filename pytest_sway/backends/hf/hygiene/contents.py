"""Detects what a test has changed for others: writes to shared memory, and process-wide patches.

A few elements of each tensor are sampled as views, which also show writes that torch does not count.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.sharing.tensor_memory import as_integers
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of, scales_of
from pytest_sway.backends.hf.sharing.trees import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__tracebackhide__ = True


class ContentsRecord:
    """The recorded contents of some tensors.

    Args:
        tensors: The tensors by name.
        whose: A prefix for each name in a report.
    """

    def __init__(self, tensors: Mapping[str, Any], whose: str = "") -> None:
        import torch

        self._whose = whose
        named = (part for name, tensor in tensors.items() for part in _with_scales(tensor, name))
        parts = {name: _plain(part) for name, part in named if part.layout is torch.strided and part.numel()}
        self._tensors = parts
        self._versions = self._current_versions()
        self._sums = {name: _checksum(tensor) for name, tensor in parts.items()}
        self._groups = alike(list(map(sample_of, parts.values())))
        self._content = self._contents()

    def changes(self) -> list[str]:
        """Return one line for each tensor whose contents have changed.

        A sample of each tensor is compared; all elements, if a sample differs or torch has counted a write.
        """
        versions = self._current_versions()
        if versions == self._versions and all(
            now.equal(before) for now, before in zip(self._contents(), self._content, strict=True)
        ):
            return []
        changed = [name for name, tensor in self._tensors.items() if _checksum(tensor) != self._sums[name]]
        self._versions = versions if not changed else self._versions
        return [f"{self._whose}{name}: contents changed" for name in changed]

    def _current_versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors.values()]

    def _contents(self) -> list[Any]:
        import torch

        return [torch.cat(group) for group in self._groups]


def _with_scales(tensor: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors with memory that a tensor is made of, and those that bitsandbytes keeps beside it, by name."""
    yield from parts_of(tensor, name)
    yield from ((f"{name} (scales, {number})", scales) for number, scales in enumerate(scales_of(tensor), start=1))


def _plain(tensor: Any) -> Any:
    """Return a tensor's memory as a plain ``torch.Tensor`` with its count of writes; `data` has a count of its own."""
    import torch

    return tensor.detach().as_subclass(torch.Tensor)


def _checksum(tensor: Any) -> tuple[float, float]:
    """Return the sums of both halves of a tensor's bits; different contents rarely have equal sums."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
    flat = tensor.detach().contiguous().flatten().view(integers[tensor.element_size()])
    half = len(flat) // 2
    return int(flat[:half].sum(dtype=torch.int64)), int(flat[half:].sum(dtype=torch.int64))


class PatchRecord:
    """Recorded process-wide state that takes part in what a model computes.

    It covers the ``forward`` of the modules' classes, transformers' attention functions and torch's global hooks.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self._forwards: dict[Any, Any] = {}
        self._owners: dict[Any, Any] = {}
        self.add(model)
        functions = _attention_functions().items()
        self._functions = {name: function for name, function in functions if not name.startswith("pytest_sway")}
        self._hooks = [(name, hooks, set(hooks)) for name, hooks in _global_hooks()]

    def add(self, model: Any) -> None:
        """Also record the classes of another model, such as PEFT's around the base's."""
        for kind in {type(module) for _, module in modules_of(model)}:
            self._forwards.setdefault(kind, kind.forward)
            self._owners.setdefault(kind, next(each for each in kind.__mro__ if "forward" in vars(each)))

    def changes(self) -> list[str]:
        """Return one line for each patch.

        A function that was patched while the model was loaded, and is the library's own again, is no patch.
        """
        functions = _attention_functions()
        self._forwards |= {kind: kind.forward for kind in self._forwards if has_own_forward(kind)}
        self._functions |= {name: now for name in self._functions if _is_transformers(now := functions.get(name))}
        found = [
            f"class {kind.__module__}.{kind.__qualname__}: its forward was replaced"
            for kind, forward in self._forwards.items()
            if kind.forward is not forward
        ]
        found += [
            f"transformers' attention function {name!r}: it was replaced"
            for name, function in self._functions.items()
            if functions.get(name) is not function
        ]
        return found + [f"torch's {name}: {len(added)} added" for name, _, added in self._added_hooks() if added]

    def restore(self) -> None:
        """Undo all patches. Loading the model again would not help: it would have the same classes."""
        for kind, forward in self._forwards.items():
            owner = self._owners[kind]
            if kind is not owner and "forward" in vars(kind):
                del kind.forward  # it inherits its own again
            if kind.forward is not forward:
                owner.forward = forward
        _attention_functions().update(self._functions)
        for _, hooks, added in self._added_hooks():
            for key in added:
                del hooks[key]

    def _added_hooks(self) -> Iterator[tuple[str, Any, list[Any]]]:
        for name, hooks, before in self._hooks:
            yield name, hooks, [key for key in hooks if key not in before]


def home_of(function: Any) -> str:
    """Return the name of the module whose code a function runs; ``functools.wraps`` makes ``__module__`` tell another.

    It is empty for what is not a function of Python.
    """
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def has_own_forward(kind: Any) -> bool:
    """Return whether a class's ``forward`` is the one that it, or a class it inherits from, was defined with.

    The decorators of transformers may be around it.
    """
    forward = kind.forward
    defined = {(parent.__module__, f"{parent.__qualname__}.forward") for parent in kind.__mro__}
    homes = {"transformers", *(parent.__module__.partition(".")[0] for parent in kind.__mro__)}
    named = (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", ""))
    return named in defined and home_of(forward).partition(".")[0] in homes


def _is_transformers(function: Any) -> bool:
    return home_of(function).startswith("transformers.")


def _attention_functions() -> dict[str, Any]:
    utilities: Any = import_module("transformers.modeling_utils")
    functions: dict[str, Any] = utilities.ALL_ATTENTION_FUNCTIONS._global_mapping
    return functions


def is_observed() -> bool:
    """Return whether hooks on all modules, modes for all operations or a profiler are active."""
    import torch

    modules: Any = import_module("torch.nn.modules.module")
    return bool(
        modules._has_any_global_hook()
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
    )


def _global_hooks() -> Iterable[tuple[str, Any]]:
    module: Any = import_module("torch.nn.modules.module")
    return [
        (name.strip("_").replace("_", " "), value) for name, value in vars(module).items() if _is_hooks(name, value)
    ]


def _is_hooks(name: str, value: Any) -> bool:
    return name.startswith("_global_") and name.endswith("_hooks") and isinstance(value, dict)


_SAMPLES: Final = 32
"""Elements of each tensor that are compared, because writes through ``.data`` do not move the version counter."""

_COUNTS: Final = (37, 41, 43, 47, 53)
"""Numbers of elements that are compared where one step leads through all of a tensor's memory.

One is taken that divides no side, so that each step moves on to another column, too. With 32 samples, a step would be
a whole number of rows in most weights of models.
"""


def sample_of(tensor: Any) -> Any:
    """Return a view of a few evenly spread elements, as integers so that NaN equals itself."""
    return as_integers(_spread(tensor.detach()))


def _spread(tensor: Any) -> Any:
    """Return a one-dimensional view of a tensor's elements. A copy would hide later writes."""
    if tensor.is_contiguous():
        return tensor.view(-1)[:: _step(tensor.shape)]
    dimensions = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    span = 1 + sum((size - 1) * stride for size, stride in dimensions)
    if span == tensor.numel():  # for example transposed: its elements fill that stretch of memory
        step = _step([size for size, _ in sorted(dimensions, key=lambda each: each[1], reverse=True)])
        return tensor.as_strided((-(-span // step),), (step,))
    stride = sum((size - 1) // (_SAMPLES - 1) * stride for size, stride in dimensions)
    if stride:  # step along all dimensions at once
        return tensor.as_strided((_SAMPLES,), (stride,))
    return tensor.as_strided(*zip(max(dimensions, default=(1, 1)), strict=True))


def _step(sides: Sequence[int]) -> int:
    """Return the distance of samples in memory, such that they lie in different rows and columns.

    Args:
        sides: A tensor's sides, in the order of its memory: the last is that of neighbours.
    """
    sides = [side for side in sides if side > 1]
    count = next((count for count in _COUNTS if all(side % count for side in sides[:-1])), _COUNTS[-1])
    step = max(1, math.prod(sides) // count)
    columns = sides[-1] if sides else 1
    while columns // math.gcd(step, columns) < min(columns, count):  # after rounding, it leads to too few columns
        step -= 1
    return step


def alike(samples: Sequence[Any]) -> list[list[Any]]:
    """Return groups of samples of one device and dtype, in their order, so that each can be concatenated."""
    groups: dict[Any, list[Any]] = {}
    for sample in samples:
        groups.setdefault((sample.device, sample.dtype), []).append(sample)
    return list(groups.values())
