"""How a tree gets its memory: the memory of the model that it was made from, and copies of what is written to.

There are three ways, by what a tensor's memory is:

* Memory that torch allocated for a CPU is cloned lazily. torch copies it when somebody is about to write to it.
* A mapped file is mapped again, privately. The operating system copies each page when somebody writes to it.
* Neither goes for an accelerator's memory, or for tensors of classes of their own, such as quantized weights. Those are
  exposed: all trees have the same memory. `contents.ContentsRecord` tells whether somebody wrote to it.
"""

from __future__ import annotations

import copy
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pytest_sway.backends.hf.sharing.mapped_files import FilePart, MappedFiles, never_written, page_flags
from pytest_sway.backends.hf.sharing.tensor_parts import is_wrapper, parts_of
from pytest_sway.backends.hf.sharing.trees import modules_of, tensors_of, tree_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_sway.backends.hf.sharing.mapped_files import MappedFile

__tracebackhide__ = True

_COPIED_BYTES: Final = 2**16
"""Buffers up to this size are copied at once. A pass may write to them, and a copy takes no longer than a clone."""


_EVEN: Final = 64
"""Bytes; torch allocates memory at multiples of this."""


class Method(Enum):
    """How a tensor is shared, where its memory is no mapped file."""

    COPIED = auto()
    LAZY_CLONE = auto()
    EXPOSED = auto()


Way: TypeAlias = Method | FilePart
"""How a tensor is shared."""


class SharedMemory:
    """The memory of a model that never runs, from which trees are made.

    Args:
        model: The model. What is neither memory of torch's nor a mapped file is moved to memory of torch's.
        ways: By the identity of a tensor, how it is shared, where that is known already. A model that was made on a
            tree of another one gives them all but for tensors of its own, which are no parts of files.

    Attributes:
        exposed: The tensors of which all trees have the same memory, by their names.
    """

    def __init__(self, model: Any, ways: Mapping[int, Way] | None = None) -> None:
        self._model = model
        self._ways: dict[int, Way] = {}
        self.exposed: dict[str, Any] = {}
        files = MappedFiles() if ways is None else None
        for module_name, module in modules_of(model):
            for members in (module._buffers, module._parameters):
                for key, tensor in members.items():
                    if tensor is None or id(tensor) in self._ways:
                        continue
                    way = None if ways is None else ways.get(id(tensor))
                    if members is module._buffers and tensor.nbytes <= _COPIED_BYTES and _is_plain(tensor):
                        way = Method.COPIED
                    self._ways[id(tensor)] = way = _way_of(tensor, files) if way is None else way
                    if way is Method.EXPOSED:
                        self.exposed[f"{module_name}.{key}" if module_name else key] = tensor
        if files is not None:
            files.give_back()  # the model never runs

    def tree(self, known: dict[int, Any] | None = None, *, isolated: bool = False, to_run: bool = False) -> Any:
        """Return a tree of the model.

        Args:
            known: By the identity of things in the model, what stands for them in the tree; all others are added.
            isolated: Copy what would be exposed, since somebody is about to write to it.
            to_run: It only computes, and no test gets it; see `MappedFile`.

        Raises:
            Exception: Something in the model cannot be copied.
        """
        import torch

        with torch.inference_mode(False), torch.no_grad():
            sharer = _Sharer(self._ways, isolated=isolated, to_run=to_run)
            tree = tree_of(self._model, sharer, known)
        for file in sharer.first_of:
            file.runs_first(tree)
        return tree

    def has_run(self, tree: Any) -> None:
        """Look what the first pass of a tree has written to; see `MappedFile`."""
        for file in {way.file for way in self._ways.values() if isinstance(way, FilePart)}:
            file.has_run(tree)

    def settle(self, tree: Any, known: Mapping[int, Any]) -> dict[int, Way]:
        """Have a tree that somebody has written to share all that was not written to.

        Args:
            tree: The tree, or a model that was made of it.
            known: What `tree` has put in there; empty where the tree was loaded anew, and shares nothing.

        Returns:
            How its tensors that are still those of the model are shared, by their identity.
        """
        import torch

        untouched, sharer = self._untouched(known), _Sharer(self._ways)
        settled: dict[int, Any] = {}
        with torch.inference_mode(False), torch.no_grad():
            for original in tensors_of(self._model):
                tensor = known.get(id(original))
                if tensor is None or id(tensor) in settled:
                    continue
                if id(tensor) in untouched or (self._ways[id(original)] is Method.COPIED and _same(original, tensor)):
                    settled[id(tensor)] = tensor
                elif _same(original, tensor):
                    settled[id(tensor)] = tensor if _is_same_memory(original, tensor) else sharer(original)
        for members in (m for module in tree.modules() for m in (module._parameters, module._buffers)):
            members.update({key: settled[id(tensor)] for key, tensor in members.items() if id(tensor) in settled})
        ways = self.ways_in(known)
        return {id(after): ways[before] for before, after in settled.items()}

    def ways_in(self, known: Mapping[int, Any]) -> dict[int, Way]:
        """Return how the tensors of a tree are shared, by their identity.

        Args:
            known: What `tree` has put in there.
        """
        return {id(known[key]): way for key, way in self._ways.items() if key in known}

    def _untouched(self, known: Mapping[int, Any]) -> set[int]:
        """Identities of a tree's tensors of which the system knows that no page was written to."""
        expected = {key: way for key, way in self._ways.items() if isinstance(way, FilePart) and key in known}
        if not expected:
            return set()
        files = MappedFiles(part.file for part in expected.values())
        with page_flags() as flags:
            return {
                id(known[key])
                for key, part in expected.items()
                if files.part_of(*_memory_of(known[key])) == part and never_written(*_memory_of(known[key]), flags)
            }


class SharedTensors:
    """Some tensors that trees share, which are in no model themselves.

    Args:
        tensors: The tensors, which are no parts of files.
    """

    def __init__(self, tensors: Iterable[Any]) -> None:
        self._tensors = list(tensors)
        # The first lazy clone of a memory is no thread's beside another, nor beside a pass that reads it.
        ways: dict[int, Way] = {}  # by the identity of a storage
        self._ways: dict[int, Way] = {}
        for tensor in self._tensors:
            storage = tensor.untyped_storage()._cdata
            if storage not in ways:
                ways[storage] = _way_of(tensor, None)
            self._ways[id(tensor)] = ways[storage]

    def exposes(self, tensor: Any) -> bool:
        """Whether all trees have the same memory of a tensor."""
        return self._ways[id(tensor)] is Method.EXPOSED

    def shared(self) -> list[Any]:
        """Return new tensors for a tree, in their order."""
        import torch

        with torch.inference_mode(False), torch.no_grad():
            return list(map(_Sharer(self._ways), self._tensors))


class _Sharer:
    """Gives the tensors of one tree their memory.

    Args:
        ways: How each is shared, by the identity of the model's.
        isolated: Copy what would be exposed.
        to_run: The tree only computes.

    Attributes:
        first_of: The files that no tree has run on yet.
    """

    def __init__(self, ways: Mapping[int, Way], *, isolated: bool = False, to_run: bool = False) -> None:
        self._ways = ways
        self._isolated = isolated
        self._to_run = to_run
        self._mappings: dict[MappedFile, Any] = {}
        self._storages: dict[int, Any] = {}
        self.first_of: list[MappedFile] = []

    def __call__(self, tensor: Any) -> Any:
        way = self._ways.get(id(tensor))
        if way is None:  # an attribute of a module, which is neither parameter nor buffer
            way = Method.COPIED if tensor.nbytes <= _COPIED_BYTES else _way_of(tensor, None)
        if way is Method.EXPOSED:
            return copy.deepcopy(tensor) if self._isolated else _same_memory(tensor)
        if way is Method.COPIED:
            return _like(tensor, tensor.detach().clone())
        return _like(tensor, _on_storage(self._storage(tensor, way), tensor))

    def _storage(self, tensor: Any, way: Any) -> Any:
        source = tensor.untyped_storage()._cdata
        if source not in self._storages:
            clone = _lazy_clone(tensor) if way is Method.LAZY_CLONE else self._mapped(way)
            self._storages[source] = clone
        return self._storages[source]

    def _mapped(self, part: FilePart) -> Any:
        if part.file not in self._mappings:
            self._mappings[part.file] = self._mapping(part.file)
        return self._mappings[part.file][part.start : part.start + part.nbytes]

    def _mapping(self, file: MappedFile) -> Any:
        if not self._to_run:
            return file.mapped()
        mapping, is_first = file.mapped_to_run()
        if is_first:
            self.first_of.append(file)
        return mapping


# --- tensors ----------------------------------------------------------------------------------------------------------


def _way_of(tensor: Any, files: MappedFiles | None) -> Way:
    """How a tensor is to be shared; one whose memory allows neither way is moved to memory of torch's."""
    if _is_exposed(tensor):
        return Method.EXPOSED
    if _lazy_clone(tensor) is not None:
        return Method.LAZY_CLONE
    part = None if files is None else files.part_of(*_memory_of(tensor))
    if part is None:
        tensor.data = _moved(tensor)
        return Method.LAZY_CLONE
    return part


def _moved(tensor: Any) -> Any:
    """A copy of a tensor's memory, at an address as even as its own, by which kernels choose how they sum."""
    import torch

    source = tensor.untyped_storage()
    uneven = address_of(tensor) % _EVEN
    uneven -= uneven % tensor.element_size()
    storage = torch.empty(source.nbytes() + uneven, dtype=torch.uint8).untyped_storage()
    storage[uneven:].copy_(source)
    offset = tensor.storage_offset() + uneven // tensor.element_size()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.size(), tensor.stride())


def _is_exposed(tensor: Any) -> bool:
    return not _is_plain(tensor) or tensor.device.type != "cpu" or not _can_clone_lazily()


def _is_plain(tensor: Any) -> bool:
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _can_clone_lazily() -> bool:
    import torch

    return hasattr(torch, "_lazy_clone") and hasattr(torch._C, "_data_address")


def _lazy_clone(tensor: Any) -> Any | None:
    """A storage with the same memory, which torch copies on the first write to either; ``None`` if it cannot."""
    import torch

    try:
        return torch._lazy_clone(tensor.detach()).untyped_storage()
    except RuntimeError:  # memory that torch did not allocate itself
        return None


def address_of(tensor: Any) -> int:
    """Return where a tensor's storage begins in memory; unlike ``data_ptr()``, this does not end a lazy clone."""
    import torch

    address = getattr(torch._C, "_data_address", None)
    return int(tensor.untyped_storage().data_ptr() if address is None else address(tensor))


def _memory_of(tensor: Any) -> tuple[int, int]:
    """Where a tensor's storage begins, and how long it is."""
    return address_of(tensor), tensor.untyped_storage().nbytes()


def _on_storage(storage: Any, tensor: Any) -> Any:
    """A tensor like another one, on another storage."""
    import torch

    like = tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, *like)


def _like(tensor: Any, data: Any) -> Any:
    """``data`` as a parameter or tensor with the attributes of another."""
    import torch

    if isinstance(tensor, torch.nn.Parameter):
        made: Any = torch.nn.Parameter(data, requires_grad=tensor.requires_grad)
    else:
        made = data
    if vars(tensor):
        vars(made).update(vars(tensor))
    return made


def _same_memory(tensor: Any) -> Any:
    """A tensor of the same class with the same memory."""
    import torch

    if _is_plain(tensor):
        return _like(tensor, tensor.detach())
    if is_wrapper(tensor):
        return _like(tensor, tensor.detach())  # whose class makes a new wrapper around the same tensors
    made: Any = torch.Tensor._make_subclass(type(tensor), tensor.data, tensor.requires_grad)
    vars(made).update((name, _attribute(value)) for name, value in vars(tensor).items())
    return made


def _attribute(value: Any) -> Any:
    """What a quantized tensor keeps beside its contents: an object of its own, with the same tensors in it."""
    return copy.copy(value) if hasattr(value, "__dict__") and not callable(value) else value


def _same(theirs: Any, ours: Any) -> bool:
    """Whether a tree's tensor is what it was made as."""
    if (theirs.shape, theirs.dtype, theirs.device) != (ours.shape, ours.dtype, ours.device):
        return False
    if type(theirs) is type(ours) and is_wrapper(ours):
        pairs = zip(parts_of(theirs), parts_of(ours), strict=True)
        return all(its == other and _same(one, another) for (its, one), (other, another) in pairs)
    if not _is_plain(ours) or not _is_plain(theirs):
        return bool((theirs == ours).all())
    return _is_same_memory(theirs, ours) or _equal_bits(theirs, ours)


def _is_same_memory(theirs: Any, ours: Any) -> bool:
    """Whether two tensors are views of one memory, or of one file."""
    if not _is_plain(ours) or not _is_plain(theirs):
        return False
    layout = theirs.storage_offset(), theirs.stride()
    return address_of(theirs) == address_of(ours) and layout == (ours.storage_offset(), ours.stride())


def _equal_bits(one: Any, other: Any) -> bool:
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = integers.get(one.element_size())
    if kind is None or one.is_complex():
        return bool(one.equal(other))
    return bool(one.detach().contiguous().view(kind).equal(other.detach().contiguous().view(kind)))
