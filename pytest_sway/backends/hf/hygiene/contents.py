"""Detects what a test has changed for others: writes to shared memory, and process-wide patches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.hygiene.samples import alike, sample_of
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of, scales_of
from pytest_sway.backends.hf.sharing.trees import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

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
        self._forwards |= {kind: kind.forward for kind in self._forwards if _is_own(kind.forward, kind)}
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


def _is_own(forward: Any, kind: type) -> bool:
    """Return whether a ``forward`` is the one that a class, or a class it inherits from, was defined with."""
    defined = {(parent.__module__, f"{parent.__qualname__}.forward") for parent in kind.__mro__}
    return (getattr(forward, "__module__", ""), getattr(forward, "__qualname__", "")) in defined


def _is_transformers(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("transformers.")


def _attention_functions() -> dict[str, Any]:
    utilities: Any = import_module("transformers.modeling_utils")
    functions: dict[str, Any] = utilities.ALL_ATTENTION_FUNCTIONS._global_mapping
    return functions


def _global_hooks() -> Iterable[tuple[str, Any]]:
    module: Any = import_module("torch.nn.modules.module")
    return [
        (name.strip("_").replace("_", " "), value) for name, value in vars(module).items() if _is_hooks(name, value)
    ]


def _is_hooks(name: str, value: Any) -> bool:
    return name.startswith("_global_") and name.endswith("_hooks") and isinstance(value, dict)
