"""Shares one copy of converted weights per host: the first worker that needs them writes a file, and all map it.

Processes map safetensors files whose dtype needs no conversion, so a host holds those once. With a conversion, each
process would hold its own copy. So one worker loads the model and writes it into a folder of this run, under a lock
that the system releases if the worker dies. It loads the copy back, compares it to the bit, and only then gives it its
name. The comparison takes a fifth of that time (0.4 of 2.0 s for SmolLM2-135M), once per run; our tests do not cover
the weights of every architecture. A failure costs memory and time, never a result: the worker loads its own copy, and
warns.

The file is written here, so that each tensor is aligned as torch aligns it in memory. The library's ``save_file`` puts
none of the 272 tensors of SmolLM2-135M at a multiple of 64 bytes, and matrix products can round differently at other
addresses. Its errors do not report a full disk. Before version 0.8, it copies every tensor into ``bytes`` first.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from pytest_sway.backends.checkpoints.gguf_header import gguf_file
from pytest_sway.backends.checkpoints.hub_files import base_file, missing_shard
from pytest_sway.backends.checkpoints.sizes import base_entries
from pytest_sway.backends.hf.hygiene.memory import collect
from pytest_sway.backends.hf.loading.model import load_model
from pytest_sway.backends.libraries.process import PROCESS_STATE
from pytest_sway.errors import SwayError, SwayWarning
from pytest_sway.spec.identity import base_key
from pytest_sway.spec.model_kwargs import as_mapping
from pytest_sway.spec.paths import short_name
from pytest_sway.system.reading import CONFIG_BYTES, read_bounded
from pytest_sway.system.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pytest_sway.spec.model_spec import ModelSpec

__tracebackhide__ = True


_ONE_THREAD: Final = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers 5 reads it for each load; 4 has no threads
_STORED: Final = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_SAME_WEIGHTS: Final = frozenset({"attn_implementation", "experts_implementation"})
"""Arguments of a load with which a model has the same weights as without them."""

_SOURCES: Final = frozenset({".json", ".safetensors", ".bin", ".py"})
"""Suffixes of files that a model is loaded from."""


class SharedWeights:
    """Loads models so that all processes that share a folder hold one copy of converted weights.

    Args:
        folder: A folder of this run on this host, to which its workers can write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._refused: set[Path] = set()

    def load_model(self, spec: ModelSpec) -> Any:
        """Load the model of a resolved spec's base, equal to the bit to what `model.load_model` returns.

        Raises:
            SwayError: As `model.load_model` does.
        """
        place = self._place(spec)
        if place is None or place in self._refused:
            return load_model(spec)
        try:
            return self._mapped(spec, place)
        except Exception as error:
            why = _reason(error)
        model = load_model(spec)  # raises if the base itself is at fault
        self._refused.add(place)
        warnings.warn(
            f"the weights of {short_name(spec.base)}, converted to {spec.dtype}, are not shared between workers:"
            f" {why}. Each worker holds a copy of its own, as with sway_share_weights = off.",
            SwayWarning,
            stacklevel=2,
        )
        return model

    def _place(self, spec: ModelSpec) -> Path | None:
        """Return the folder for a model's shared copy, existing or not; ``None`` if there is nothing to share."""
        if spec.device.partition(":")[0] != "cpu" or sys.platform == "win32":  # weights are not mapped there
            return None
        if _source(spec) is None or missing_shard(spec) is not None:
            load_model(spec)  # downloads it: its files decide what to do
        return self._folder / _identity(spec) if _needs_conversion(spec) else None

    def _mapped(self, spec: ModelSpec, place: Path) -> Any:
        if not place.is_dir():
            with _locked(place.with_suffix(".lock")):
                if not place.is_dir():
                    return _convert(spec, place)
        return load_model(spec, converted=place / _name(spec))


def _convert(spec: ModelSpec, place: Path) -> Any:
    """Load a model, write its weights for all, and return it mapped from that file. The caller holds the lock.

    Raises:
        ValueError: The copy differs when it is read back.
    """
    with _in_this_thread():
        model = load_model(spec)
    if place.name != _identity(spec):  # the base's files have changed meanwhile: nobody knows what was loaded
        return model
    unfinished = place.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # a worker that died has left it
    try:
        folder = unfinished / _name(spec)
        _write(spec, model, folder)
        mapped = load_model(spec, converted=folder)
        if difference := _difference(model, mapped):
            raise ValueError(f"the copy that is read back differs in {difference}")
        unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    del model
    collect("cpu")
    return mapped


# --- what is shared, and under which name -----------------------------------------------------------------------------


def _source(spec: ModelSpec) -> Path | None:
    """Return the folder of the base's files; ``None`` if they are not on this machine yet."""
    gguf = gguf_file(spec)
    if gguf is not None:
        return gguf.parent
    config = base_file(spec, "config.json")
    return None if config is None else config.parent


def _name(spec: ModelSpec) -> str:
    """Return the source folder's name, which is part of the module names of a base's own code."""
    source = _source(spec)
    return "model" if source is None else source.name


def _needs_conversion(spec: ModelSpec) -> bool:
    if as_mapping(spec.model_kwargs).keys() - _SAME_WEIGHTS:
        return False
    if gguf_file(spec) is not None:
        return True
    config = base_file(spec, "config.json")
    try:
        if config is None or json.loads(read_bounded(config, CONFIG_BYTES)).get("quantization_config"):
            return False
        entries = base_entries(spec)
    except (SwayError, OSError, ValueError, AttributeError, RecursionError):
        return False  # the load itself will say what is wrong
    return entries is None or any(e.floating and e.dtype != _STORED[spec.dtype] for e in entries.values())


def _identity(spec: ModelSpec) -> str:
    """Return a name that changes with the base's files and with the libraries that read them."""
    source = _source(spec)
    files = () if source is None else sorted(p for p in source.iterdir() if p.suffix in _SOURCES)
    states = [(p.name, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino) for p in files for st in (p.stat(),)]
    libraries = version("torch"), version("transformers")
    identity = (base_key(spec), spec.trust_remote_code, str(source), states, libraries)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


# --- the copy ---------------------------------------------------------------------------------------------------------


@contextmanager
def _in_this_thread() -> Iterator[None]:
    """Make transformers convert in this thread: glibc keeps up to a tenth of a model that other threads free."""
    with PROCESS_STATE:
        before = os.environ.get(_ONE_THREAD)
        os.environ[_ONE_THREAD] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_ONE_THREAD]
            else:
                os.environ[_ONE_THREAD] = before


def _write(spec: ModelSpec, model: Any, folder: Path) -> None:
    """Write a model's weights as they are in memory, with the base's files that describe the model."""
    folder.parent.mkdir()  # not its parents: if the run's folder is gone, the run has ended
    folder.mkdir()
    if gguf_file(spec) is None:
        _copy_settings(spec, folder)
    else:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    distinct = {(t.data_ptr(), t.shape, t.stride()): name for name, t in reversed(model.state_dict().items())}
    tensors = model.state_dict()
    write_tensors(folder / "model.safetensors", {name: tensors[name] for name in distinct.values()})


def _copy_settings(spec: ModelSpec, folder: Path) -> None:
    source = _source(spec)
    assert source is not None
    code = source.rglob("*.py") if spec.trust_remote_code else ()
    for file in (source / "config.json", source / "generation_config.json", *code):
        if file.is_file():
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _difference(model: Any, copy: Any) -> str | None:
    """Return what differs between a model and its copy; ``None`` if nothing does."""
    for what, before, now in (
        ("its class", type(model), type(copy)),
        ("its config", model.config, copy.config),
        ("its generation_config", *(getattr(m, "generation_config", None) for m in (model, copy))),
    ):
        if before != now:
            return what
    tensors, others = _tensors(model), _tensors(copy)
    if tensors.keys() != others.keys() or _places(tensors) != _places(others):
        return "the names of its tensors"
    different = [name for name in set(_places(tensors).values()) if not _equal(tensors[name], others[name])]
    return f"{len(different)} tensors, such as {min(different)}" if different else None


def _tensors(model: Any) -> dict[str, Any]:
    named = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return {name: tensor for pairs in named for name, tensor in pairs}


def _places(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return for each tensor the first name at its place in memory: its own name, unless it is tied."""
    first: dict[tuple[int, int], str] = {}
    return {name: first.setdefault((t.data_ptr(), t.nbytes), name) for name, t in tensors.items()}


def _equal(a: Any, b: Any) -> bool:
    return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and raw_bytes(a).equal(raw_bytes(b))


# --- taking turns -----------------------------------------------------------------------------------------------------


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system releases when its holder dies.

    filelock would recreate the folder of a run that has ended, and nobody would remove it.

    Raises:
        OSError: The file system has no locks, or the folder is gone.
    """
    import fcntl  # not on Windows

    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child that was forked meanwhile may keep the descriptor open
    finally:
        os.close(lock)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; set the environment variable TMPDIR to use another place"
    return f"{type(error).__name__}: {redacted(str(error)).rstrip('.')}"


ALIGNMENT: Final = 64
"""Bytes. torch allocates tensors at multiples of this; matrix products can round differently at other addresses."""

_DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write CPU tensors to a new file, each at a multiple of `ALIGNMENT` bytes as far as sizes allow.

    Raises:
        OSError: The disk is full, or the file cannot be written.
        TypeError: A tensor's dtype is not supported.
    """
    # The format allows no gaps, so tensors that would misalign those after them come last.
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT, -item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head = head.ljust(math.ceil((8 + len(head)) / ALIGNMENT) * ALIGNMENT - 8)
    if shutil.disk_usage(path.parent).free < 8 + len(head) + end:  # others need the disk too: don't fill it first
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, tensor in ordered:
            file.write(memoryview(raw_bytes(tensor).numpy()))


def _dtype(name: str, tensor: Any) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {dtype}, which the safetensors writer does not support")
    return _DTYPES[dtype]


def raw_bytes(tensor: Any) -> Any:
    """Return the contents of a CPU tensor as a flat ``uint8`` tensor, without a copy if it is contiguous."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
