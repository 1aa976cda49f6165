"""Gives a tree its memory: that of the model that it was made from, with copies of what is written to.

A tensor's memory is shared in one of three ways:

* Memory that torch allocated for a CPU or a CUDA device is cloned lazily: torch copies it before the first write to it.
  A CUDA device's is watched all the same, since torch's optimizers write to it without that copy.
* A mapped file is mapped again, privately. The operating system copies each page when somebody writes to it.
* The memory of other devices, tensors of other classes such as bitsandbytes' weights, and quantized weights on a CUDA
  device allow neither. They are exposed: all trees have the same memory, and `contents.ContentsRecord` detects writes
  to it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.hf.sharing.mapped_files import FilePart, MappedFiles, never_written, page_flags
from pytest_sway.backends.hf.sharing.tensor_memory import (
    Method,
    is_open_to_writes,
    is_plain,
    is_same,
    is_same_memory,
    lazy_clone,
    like,
    memory_of,
    on_storage,
    same_memory,
    way_of,
)
from pytest_sway.backends.hf.sharing.trees import attributes_of, modules_of, put_attributes_within, tensors_of, tree_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_sway.backends.hf.sharing.mapped_files import MappedFile
    from pytest_sway.backends.hf.sharing.tensor_memory import Way

__tracebackhide__ = True

_COPIED_BYTES: Final = 2**16
"""Buffers up to this size are copied at once: a pass may write to them, and a copy takes no longer than a clone."""


class SharedMemory:
    """The memory of a model that never runs, from which trees are made.

    Args:
        model: The model. Memory that is neither torch's nor a mapped file's is moved to memory of torch's.
        ways: How tensors are shared, by their ``id``, where that is known already. A model that was made on a tree of
            another model gives all but those of its own tensors, which are no parts of files.

    Attributes:
        exposed: The tensors whose memory a write in one tree can change for all trees, by name.
    """

    def __init__(self, model: Any, ways: Mapping[int, Way] | None = None) -> None:
        self._model = model
        self._ways: dict[int, Way] = {}
        self.exposed: dict[str, Any] = {}
        files = MappedFiles() if ways is None else None
        quantized = bool(getattr(getattr(model, "config", None), "quantization_config", None))
        for module_name, module in modules_of(model):
            for members in (module._buffers, module._parameters):
                for key, tensor in members.items():
                    if tensor is None or id(tensor) in self._ways:
                        continue
                    way = None if ways is None else ways.get(id(tensor))
                    if members is module._buffers and tensor.nbytes <= _COPIED_BYTES and is_plain(tensor):
                        way = Method.COPIED
                    if way is None:
                        way = way_of(tensor, files, quantized=quantized)
                    self._ways[id(tensor)] = way
                    if is_open_to_writes(tensor, way):
                        self.exposed[f"{module_name}.{key}" if module_name else key] = tensor
        if files is not None:
            files.give_back()  # the model never runs

    def tree(
        self,
        known: dict[int, Any] | None = None,
        *,
        isolated: bool = False,
        to_run: bool = False,
        taken: list[Any] | None = None,
    ) -> Any:
        """Return a tree of the model.

        Args:
            known: The tree's objects, by the ``id`` of the model's objects that they replace; new ones are added.
            isolated: Copy exposed tensors, because the caller is about to write to them.
            to_run: The tree only computes and no test gets it; see `MappedFile`.
            taken: See `trees.tree_of`.

        Raises:
            Exception: Something in the model cannot be copied.
        """
        import torch

        with torch.inference_mode(False), torch.no_grad():
            sharer = _Sharer(self._ways, isolated=isolated, to_run=to_run)
            tree = tree_of(self._model, sharer, known, taken)
        for file in sharer.first_of:
            file.runs_first(tree)
        return tree

    def has_run(self, tree: Any) -> None:
        """Check what a tree's first pass has written to; see `MappedFile`."""
        for file in {way.file for way in self._ways.values() if isinstance(way, FilePart)}:
            file.has_run(tree)

    def settle(self, tree: Any, known: Mapping[int, Any]) -> dict[int, Way]:
        """Make a tree that somebody has written to share all memory that was not changed.

        Args:
            tree: The tree, or a model that was made of it.
            known: What `tree` has added to its ``known``; empty if the tree was loaded anew and shares nothing.

        Returns:
            How the tensors that still equal the model's are shared, by their ``id``.
        """
        import torch

        untouched, sharer = self._untouched(known), _Sharer(self._ways)
        places = {key: it for key, it in known.items() if key in self._ways or isinstance(it, torch.nn.Module)}
        settled: dict[int, Any] = {}
        renewed: dict[int, Any] = {}
        with torch.inference_mode(False), torch.no_grad():
            for original in tensors_of(self._model):
                tensor = known.get(id(original))
                if tensor is None or id(tensor) in settled:
                    continue
                if id(tensor) in untouched or is_same_memory(original, tensor):
                    settled[id(tensor)] = tensor
                elif is_same(original, tensor):
                    copied = self._ways[id(original)] is Method.COPIED
                    settled[id(tensor)] = made = tensor if copied else sharer(original)
                    put_attributes_within(made, original, places)
                    renewed |= attributes_of(tensor, made)
        for module in tree.modules():
            for members in (module._parameters, module._buffers):
                members.update({key: settled[id(tensor)] for key, tensor in members.items() if id(tensor) in settled})
            if renewed:
                vars(module).update({key: renewed[id(it)] for key, it in vars(module).items() if id(it) in renewed})
        ways = self.ways_in(known)
        return {id(after): ways[before] for before, after in settled.items()}

    def ways_in(self, known: Mapping[int, Any]) -> dict[int, Way]:
        """Return how a tree's tensors are shared, by their ``id``.

        Args:
            known: What `tree` has added to its ``known``.
        """
        return {id(known[key]): way for key, way in self._ways.items() if key in known}

    def _untouched(self, known: Mapping[int, Any]) -> set[int]:
        """Return the ids of a tree's tensors whose pages were never written to, according to the system."""
        expected = {key: way for key, way in self._ways.items() if isinstance(way, FilePart) and key in known}
        if not expected:
            return set()
        files = MappedFiles(part.file for part in expected.values())
        with page_flags() as flags:
            return {
                id(known[key])
                for key, part in expected.items()
                if files.part_of(*memory_of(known[key])) == part and never_written(*memory_of(known[key]), flags)
            }


class SharedTensors:
    """Tensors that trees share and that are in no model themselves.

    Args:
        tensors: The tensors, which are no parts of files.
    """

    def __init__(self, tensors: Iterable[Any]) -> None:
        self._tensors = list(tensors)
        # The first lazy clone of a memory is not thread-safe, so it is made here, before any pass reads the memory.
        ways: dict[int, Way] = {}  # by the identity of a storage
        self._ways: dict[int, Way] = {}
        for tensor in self._tensors:
            storage = tensor.untyped_storage()._cdata
            if storage not in ways:
                ways[storage] = way_of(tensor, None)
            self._ways[id(tensor)] = ways[storage]

    def exposes(self, tensor: Any) -> bool:
        """Return whether a write in one tree can change a tensor's memory for all trees."""
        return is_open_to_writes(tensor, self._ways[id(tensor)])

    def shared(self) -> list[Any]:
        """Return new tensors for a tree, in the order of the originals."""
        import torch

        with torch.inference_mode(False), torch.no_grad():
            return list(map(_Sharer(self._ways), self._tensors))


class _Sharer:
    """Gives the tensors of one tree their memory.

    Args:
        ways: How each tensor of the model is shared, by its ``id``.
        isolated: Copy exposed tensors.
        to_run: The tree only computes.

    Attributes:
        first_of: The mapped files that this tree is the first to run on.
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
        if way is None:  # a module's attribute that is neither parameter nor buffer
            way = Method.COPIED if tensor.nbytes <= _COPIED_BYTES else way_of(tensor, None)
        if way is Method.EXPOSED:
            if not self._isolated:
                return same_memory(tensor)
            return like(tensor, tensor.detach().clone()) if is_plain(tensor) else copy.deepcopy(tensor)
        if way is Method.COPIED:
            return like(tensor, tensor.detach().clone())
        return like(tensor, on_storage(self._storage(tensor, way), tensor))

    def _storage(self, tensor: Any, way: Any) -> Any:
        source = tensor.untyped_storage()._cdata
        if source not in self._storages:
            clone = lazy_clone(tensor) if way is Method.LAZY_CLONE else self._mapped(way)
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
