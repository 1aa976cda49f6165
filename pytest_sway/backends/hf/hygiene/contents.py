"""What a test can still spoil for others: memory that is exposed to it, and what is patched for the whole process."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytest_sway.backends.hf.hygiene.samples import by_dtype, sample_of
from pytest_sway.backends.hf.sharing.tensor_parts import parts_of
from pytest_sway.backends.hf.sharing.trees import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__tracebackhide__ = True


class ContentsRecord:
    """What was in the memory of some tensors.

    Args:
        tensors: The tensors by name.
        whose: What stands before each name in a report.
    """

    def __init__(self, tensors: Mapping[str, Any], whose: str = "") -> None:
        import torch

        self._whose = whose
        named = (part for name, tensor in tensors.items() for part in parts_of(tensor, name))
        parts = {name: _plain(part) for name, part in named if part.layout is torch.strided and part.numel()}
        self._tensors = parts
        self._versions = self._current_versions()
        self._sums = {name: _checksum(tensor) for name, tensor in parts.items()}
        self._groups = by_dtype(list(map(sample_of, parts.values())))
        self._content = self._contents()

    def changes(self) -> list[str]:
        """One line for each tensor whose contents are no longer what they were.

        A few elements of each tell, whichever way they were written. Where torch has counted a write, all elements do.
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

        return [torch.cat(group) for group in self._groups.values()]


def _plain(tensor: Any) -> Any:
    """A tensor's memory without what its class makes of it; where it can be, with its count of writes."""
    import torch

    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor.detach()  # whose count is the tensor's and its trees', while that of `.data` is its own
    return tensor.data.as_subclass(torch.Tensor)


def _checksum(tensor: Any) -> tuple[float, float]:
    """Two numbers that differ when the contents do, but for rare chance."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(integers[tensor.element_size()]).flatten()
    half = len(flat) // 2
    return int(flat[:half].sum(dtype=torch.int64)), int(flat[half:].sum(dtype=torch.int64))


class PatchRecord:
    """What was in force for the whole process and takes part in what a model computes.

    That is the ``forward`` of its modules' classes, transformers' attention functions and torch's hooks on all modules.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self._forwards: dict[Any, Any] = {}
        self.add(model)
        functions = _attention_functions().items()
        self._functions = {name: function for name, function in functions if not name.startswith("pytest_sway")}
        self._hooks = [(name, hooks, set(hooks)) for name, hooks in _global_hooks()]

    def add(self, model: Any) -> None:
        """Record the classes of one more model, such as PEFT's around the base's."""
        for kind in {type(module) for _, module in modules_of(model)}:
            self._forwards.setdefault(kind, kind.forward)

    def changes(self) -> list[str]:
        """One line for each thing that is no longer as it was.

        What was patched while the model was loaded, and is its library's own again, counts as it is now.
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
        """Put back what was there: a model that is loaded anew would have the same classes."""
        for kind, forward in self._forwards.items():
            if kind.forward is not forward:
                kind.forward = forward
        _attention_functions().update(self._functions)
        for _, hooks, added in self._added_hooks():
            for key in added:
                del hooks[key]

    def _added_hooks(self) -> Iterator[tuple[str, Any, list[Any]]]:
        for name, hooks, before in self._hooks:
            yield name, hooks, [key for key in hooks if key not in before]


def _is_own(forward: Any, kind: type) -> bool:
    """Whether a ``forward`` is the one that a class, or one that it inherits from, was defined with."""
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
